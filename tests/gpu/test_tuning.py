"""The cache of timed choices, without a GPU: who may write it, what survives, and that nothing happens unasked."""

from __future__ import annotations

import json
import os
import stat
from contextlib import nullcontext
from multiprocessing import get_context

import cases
import pytest
import torch
import triton

from gpu.interpret import interpreted
from gpu.launching import send_to_triton
from limber_fast import info_nce
from limber_fast.backends.triton import device, tuning
from limber_fast.kernels import info_nce_launch

CANDIDATES = ("narrow", "wide")


@pytest.mark.parametrize("asked", [False, True])
def test_info_nce_times_its_programs_once_and_only_when_asked(fresh, monkeypatch, asked):
    """A call for every candidate, the fastest from then on, and the same bits either way."""
    send_to_triton(monkeypatch, "info_nce", "interpreted", 4)
    monkeypatch.setattr(device, "may_time", lambda where: True)
    monkeypatch.setattr(device, "versions", lambda where: "a GPU")
    if asked:
        monkeypatch.setenv(tuning.ENVIRONMENT_VARIABLE, "1")
    started, timed, launched = [], [], info_nce_launch.info_nce_fwd

    def forward(call, with_stats):
        started.append(call.programs)
        return launched(call, with_stats)

    def do_bench(step):
        step()
        timed.append(started[-1])
        return {4: 3.0, 2: 1.0, 8: 2.0}[started[-1]]

    monkeypatch.setattr(info_nce_launch, "info_nce_fwd", forward)
    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    image, text, scale = cases.towers("unit", 150, 150, 40, torch.float32)
    results = []
    with interpreted():
        for _ in range(2):
            leaves = [x.detach().requires_grad_() for x in (image, text)]
            loss = info_nce(*leaves, scale)
            results.append((loss, *torch.autograd.grad(loss, leaves)))
    assert timed == ([4, 2, 8] if asked else [])
    assert started == ([4, 2, 8, 2, 2] if asked else [4, 4])
    assert fresh.exists() == asked
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "_chosen", {})
    return tmp_path / "limber_fast"


def forget(monkeypatch) -> None:
    """As in the next process."""
    monkeypatch.setattr(tuning, "_chosen", {})


def never(name: str) -> float:
    raise AssertionError(f"{name} was timed")


def test_fastest_is_kept(fresh, monkeypatch):
    assert tuning.choose("a", CANDIDATES, {"narrow": 2.0, "wide": 1.0}.get) == "wide"
    assert tuning.choose("a", CANDIDATES, never) == "wide"
    forget(monkeypatch)
    assert tuning.choose("a", CANDIDATES, never) == "wide"
    assert tuning.choose("b", CANDIDATES, {"narrow": 1.0, "wide": 2.0}.get) == "narrow"
    assert tuning.read(fresh) == {"a": "wide", "b": "narrow"}


def test_what_is_no_candidate_any_more_is_timed_again(monkeypatch):
    tuning.choose("a", ("gone", "narrow"), {"gone": 1.0, "narrow": 2.0}.get)
    forget(monkeypatch)
    assert tuning.choose("a", CANDIDATES, {"narrow": 1.0, "wide": 2.0}.get) == "narrow"


def test_folder_is_the_users_alone(fresh):
    tuning.choose("a", CANDIDATES, len)
    assert stat.S_IMODE(fresh.stat().st_mode) == 0o700
    assert sorted(path.name for path in fresh.iterdir()) == ["autotune.json", "autotune.lock"]


def test_folder_that_others_may_read_becomes_the_users_alone(fresh):
    fresh.mkdir(mode=0o755)
    tuning.choose("a", CANDIDATES, len)
    assert stat.S_IMODE(fresh.stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_folder_that_others_may_write_is_refused(fresh, mode):
    fresh.mkdir()
    fresh.chmod(mode)
    (fresh / "autotune.json").write_text(json.dumps({"format": tuning._FORMAT, "chosen": {"a": "wide"}}))
    with pytest.raises(PermissionError, match="must be a folder that only you can write to"):
        tuning.choose("a", CANDIDATES, never)


def test_link_to_another_folder_is_refused(fresh, tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    fresh.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError, match="found l"):
        tuning.choose("a", CANDIDATES, never)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_folder_of_somebody_else_is_refused(fresh):
    fresh.mkdir(mode=0o700)
    os.chown(fresh, 12345, -1)
    with pytest.raises(PermissionError, match="of user 12345"):
        tuning.private_folder()


GOOD = json.dumps({"format": tuning._FORMAT, "chosen": {"a": "wide"}})


@pytest.mark.parametrize(
    "content",
    ["", GOOD[:-9], "[]", '"text"', "{}", GOOD.replace("/1", "/0"), GOOD.replace('"wide"', "3"), "\udcff\x00"],
)
def test_corrupt_file_is_replaced(fresh, content):
    fresh.mkdir(mode=0o700)
    (fresh / "autotune.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert tuning.read(fresh) == {}
    assert tuning.choose("a", CANDIDATES, {"narrow": 1.0, "wide": 2.0}.get) == "narrow"
    assert tuning.read(fresh) == {"a": "narrow"}


def test_failed_write_leaves_the_old_file(fresh, monkeypatch):
    tuning.choose("a", CANDIDATES, len)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        tuning.choose("b", CANDIDATES, len)
    assert tuning.read(fresh) == {"a": "wide"} and not list(fresh.glob("*.tmp"))


def add_many(name: str) -> None:
    for i in range(20):
        tuning.choose(f"{name}{i}", CANDIDATES, len)


def test_concurrent_writers_lose_nothing(fresh):
    context = get_context("fork")
    writers = [context.Process(target=add_many, args=(name,)) for name in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert len(tuning.read(fresh)) == 60


@pytest.mark.parametrize(("value", "expected"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_only_when_asked(monkeypatch, value, expected):
    monkeypatch.delenv(tuning.ENVIRONMENT_VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(tuning.ENVIRONMENT_VARIABLE, value)
    assert tuning.asked() is expected


def test_other_values_are_refused(monkeypatch):
    monkeypatch.setenv(tuning.ENVIRONMENT_VARIABLE, "yes")
    with pytest.raises(ValueError, match="must be 0 or 1; got 'yes'"):
        tuning.asked()


def test_launches_go_to_the_device_of_their_tensors(monkeypatch):
    """Not to whichever is current."""
    entered = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: entered.append(x) or nullcontext())
    send_to_triton(monkeypatch, "info_nce", "interpreted")
    image, text, scale = cases.unit(5, 5, 16)
    image, text = image.float(), text.float()
    image.requires_grad_()
    with interpreted():
        info_nce(image, text, scale).backward()
    assert len(entered) == 2 and entered[0].data_ptr() == image.data_ptr()
