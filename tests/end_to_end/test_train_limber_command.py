"""`limber-fast train-limber`: several processes, being killed, the settings' file, a dry run."""

import csv
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("timm")

from limber_fast import GPTJ, Limber
from limber_fast.models.encoders import encoder
from limber_fast.train_limber import tensorboard
from limber_fast.training.checkpoint import LIMBER, load_checkpoint


def command(config, *options, processes=1):
    flags = ["--cache-features"] if config.cache_features else []
    flags += [f"--{f.name.replace('_', '-')}={getattr(config, f.name)}" for f in dataclasses.fields(config)
             if f.type in ("int", "float", "str") and getattr(config, f.name) != ""]  # fmt: skip
    python = [sys.executable]
    if processes > 1:
        python += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    return [*python, "-m", "limber_fast", "train-limber", *flags, *options]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("magma", [False, True])
def test_two_processes_train_as_one(config, tmp_path, magma):
    config = dataclasses.replace(config, dropout=0.0, steps=4, learning_rate=1e-3)
    if magma:
        config = dataclasses.replace(config, adapters=16, layer_norm=True, grad_checkpointing=True)
    maps = []
    for processes in (1, 2):
        mine = dataclasses.replace(config, output=str(tmp_path / f"of{processes}"))
        ours = command(mine, processes=processes)
        done = subprocess.run(ours, capture_output=True, text=True, timeout=600, env=ENVIRONMENT, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        maps.append(load_checkpoint(tmp_path / f"of{processes}" / "checkpoint.pt", LIMBER))
    for a, b in zip(*(found["parameters"] for found in maps), strict=True):
        # bf16 gradients; a step of AdamW moves a weight by 1e-3 whichever sign a gradient next to 0 rounds to
        assert (a - b).abs().mean() < 2e-5
    one, two = (found["history"][-1] for found in maps)
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-3)
    assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=0.02)


def test_processes_share_the_encoding(config, tmp_path):
    """Each writes its share into one file, equal to the one that a single process makes; broken pictures are named."""
    files = []
    for processes in (1, 3):
        mine = dataclasses.replace(config, steps=3, output=str(tmp_path / f"of{processes}"))
        ours = command(mine, processes=processes)
        done = subprocess.run(ours, capture_output=True, text=True, timeout=600, env=ENVIRONMENT, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        out = tmp_path / f"of{processes}"
        files.append(((out / "features.bin").read_bytes(), json.loads((out / "features.json").read_text())))
        assert "9.jpg" in (out / "skipped.txt").read_text() and not list(out.glob(".*"))
    (one, about), (three, other) = files
    assert about == other and about["rows"] == list(range(9))
    a, b = (torch.frombuffer(bytearray(x), dtype=torch.bfloat16).float() for x in (one, three))
    torch.testing.assert_close(a, b, atol=0.02, rtol=0.02)


def test_all_processes_tell_of_broken_pictures(config, tmp_path):
    """Also without a cache, whichever process met them."""
    config = dataclasses.replace(config, steps=6, cache_features=False, output=str(tmp_path / "out"))
    ours = command(config, processes=2)
    done = subprocess.run(ours, capture_output=True, text=True, timeout=600, env=ENVIRONMENT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pictures could not be read") == 1 and "9.jpg" in done.stdout
    assert "9.jpg" in (tmp_path / "out" / "skipped.txt").read_text()


def test_a_folder_without_a_tokenizer_is_refused(config, tmp_path):
    """transformers makes a tokenizer of one word of it, and every caption would be empty."""
    bare = tmp_path / "bare"
    GPTJ.from_pretrained(config.language_model).save_pretrained(bare)
    ours = command(dataclasses.replace(config, language_model=str(bare), tokenizer=""))
    done = subprocess.run(ours, capture_output=True, text=True, timeout=600, env=ENVIRONMENT, cwd=tmp_path)
    assert done.returncode == 1 and "tokenizer must make tokens of text; got none of 'A picture of'" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_foreign_weights_of_the_encoder_are_one_line(config, tmp_path):
    pytest.importorskip("open_clip")
    (tmp_path / "text.pt").write_text("no weights\n")
    ours = command(dataclasses.replace(config, encoder="open_clip:ViT-S-32-alt", encoder_weights="text.pt"))
    done = subprocess.run(ours, capture_output=True, text=True, timeout=600, env=ENVIRONMENT, cwd=tmp_path)
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "text.pt: the file must be a state dict that holds tensors alone; got " in said
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_tensorboard_has_every_column(config, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    ours = command(dataclasses.replace(config, steps=3), "--tensorboard")
    done = subprocess.run(ours, capture_output=True, text=True, timeout=600, env=ENVIRONMENT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    events = accumulator.EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    assert {"loss", "learning_rate"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]


def test_tensorboard_has_every_step_once(tmp_path):
    """A run that was killed behind step 5, its checkpoint at step 3, and one that goes on."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, end in ((0, 5), (3, 7)):
        log = tensorboard(tmp_path, start)
        for step in range(start + 1, end + 1):
            log.add_scalar("loss", 10 * start + step, step)
        log.flush()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(x.step, x.value) for x in events.Scalars("loss")] == [
        (1, 1), (2, 2), (3, 3), (4, 34), (5, 35), (6, 36), (7, 37),
    ]  # fmt: skip


def test_command_survives_being_killed(config, tmp_path):
    config = dataclasses.replace(config, steps=120, save_every=3)
    process = subprocess.Popen(command(config), stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=tmp_path)
    checkpoint = tmp_path / "out" / "checkpoint.pt"
    deadline = time.monotonic() + 300
    while not checkpoint.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.communicate()
    step = load_checkpoint(checkpoint, LIMBER)["step"]
    assert step % 3 == 0
    ours = [*command(dataclasses.replace(config, save_every=1000)), "--resume"]
    process = subprocess.Popen(ours, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=tmp_path)
    while "resumed" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=120)[0]
    state = load_checkpoint(checkpoint, LIMBER)
    assert process.returncode == (130 if state["step"] < 120 else 0), rest
    assert state["step"] > step and not list((tmp_path / "out").glob(".*"))
    with open(tmp_path / "out" / "train.csv", encoding="utf-8") as file:
        assert int(list(csv.DictReader(file))[-1]["step"]) == state["step"]
    # To the end, and at once: the same bits.
    whole = dataclasses.replace(config, save_every=1000, output=str(tmp_path / "whole"))
    for arguments in (ours, command(whole)):
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=600, env=ENVIRONMENT, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    ends = [load_checkpoint(tmp_path / name / "checkpoint.pt", LIMBER)["parameters"] for name in ("out", "whole")]
    assert all(map(torch.equal, *ends))


def test_command_ends_in_a_map_that_loads(config, tmp_path):
    done = subprocess.run(command(config), capture_output=True, text=True, timeout=600, env=ENVIRONMENT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 pictures could not be read" in done.stdout and "\x1b" not in done.stdout
    limber = Limber.from_pretrained(tmp_path / "out" / "map", GPTJ.from_pretrained(config.language_model), encoder=None)
    saved = load_checkpoint(tmp_path / "out" / "checkpoint.pt", LIMBER)
    assert torch.equal(limber.projection.weight, saved["parameters"][0])


def test_dry_run_and_toml(config, tmp_path):
    lines = [f"{name} = {json.dumps(value)}" for name, value in config.to_dict().items()]
    (tmp_path / "run.toml").write_text("\n".join(lines))
    ours = [sys.executable, "-m", "limber_fast", "train-limber", "--config", "run.toml", "--dry-run", "--batch-size=60"]
    done = subprocess.run(ours, capture_output=True, text=True, timeout=600, env=ENVIRONMENT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "MiB kept for the backward pass of 3" in done.stdout
    weights = [encoder("timm:test_resnet", weights=None).trunk, GPTJ.from_pretrained(config.language_model)]
    mib = [sum(x.nbytes for x in (*part.parameters(), *part.buffers())) / 2**20 for part in weights]
    assert f"encoder {mib[0]:.1f} MiB, language model {mib[1]:.1f} MiB" in done.stdout and min(mib) > 0.1
    trained, kept, together = (float(re.search(rf"([\d.]+) MiB {what}", done.stdout)[1]) for what in
                               ("with gradients", "kept for", "a process"))  # fmt: skip
    assert together == pytest.approx(sum(mib) + trained + kept, abs=0.7)  # as rounded
    assert "60 = 1 x 20 x 3 pictures" in done.stdout and "12 steps" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.toml"]
    (tmp_path / "run.toml").write_text("stepz = 3")
    done = subprocess.run(ours, capture_output=True, text=True, timeout=600, env=ENVIRONMENT, cwd=tmp_path)
    assert done.returncode == 1 and "'stepz'" in done.stderr and "Traceback" not in done.stderr
