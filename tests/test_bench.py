"""`limber-fast bench` on real small rows: what it writes, a wrong kernel, and the gate. No time is asserted."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("matplotlib")

from limber_fast import cli, dispatch, native
from limber_fast.report import bench, bench_html

ROOT = Path(__file__).resolve().parent.parent
SELECT = "size-N256-D512 or width-N256-D64 or cuda"
# Makes every loss 1% too large, or, for bf16 towers, twice the gradient in one row of 256.
WRONG_KERNEL = """
import sys, torch
import limber_fast
from limber_fast import cli
right = limber_fast.info_nce
def wrong(image, text, scale, **options):
    loss = right(image, text, scale, **options)
    if image.dtype == torch.float32:
        return 1.01 * loss
    once_more = torch.zeros(len(image), 1, dtype=image.dtype)
    once_more[100] = 1
    image = image * once_more + (image * (1 - once_more)).detach()
    again = right(image, text.detach(), scale.detach(), **options)
    return loss + again - again.detach()
limber_fast.info_nce = wrong
sys.exit(cli.main(sys.argv[1:]))
"""
# From the first call of the op on it is an hour later.
HOUR_LATER = """
import sys, time
import limber_fast
from limber_fast import cli
right, clock, later = limber_fast.info_nce, time.monotonic, set()
def called(*inputs, **options):
    later.add(3600)
    return right(*inputs, **options)
limber_fast.info_nce = called
time.monotonic = lambda: clock() + sum(later)
sys.exit(cli.main(sys.argv[1:]))
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    # Of pytest's own: as a worker of pytest-xdist it would not time.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("LIMBER_FAST_", "PYTEST_"))}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=300, env=environment, check=False
    )


@pytest.fixture(scope="module", autouse=True)
def own_kernels():
    try:
        native.cpu()
    except dispatch.BackendUnavailable as missing:
        pytest.skip(f"nothing to time: {missing}")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A finished run of a few rows: the process, its folder and its bench.json."""
    folder = tmp_path_factory.mktemp("bench") / "new"
    done = run(
        "-m", "limber_fast", "bench", "--quick", "--threads", "1", "-k", SELECT, "--trace", "--output", str(folder)
    )
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(done=done, folder=folder, result=json.loads((folder / "bench.json").read_text()))


def test_rows_say_what_ran_and_against_what(small):
    result = small.result
    assert result["schema"] == bench.SCHEMA and result["threads"] == 1
    rows = {row["id"]: row for row in result["rows"]}
    assert len(rows) == len(result["rows"]) == 6
    row = rows["info_nce/size/N256-D512-bf16"]
    assert row["shape"] == {"N": 256, "D": 512} and (row["dtype"], row["device"]) == ("bfloat16", "cpu")
    assert (row["backend"], row["isa"], row["threads"]) == ("cpu", result["machine"]["cpu"]["isa"], 1)
    timed = ("flops", "bytes", "warm_s", "best_s", "cold_s", "flop_per_s", "ceiling_flop_per_s", "ceiling_fraction",
             "eager_ratio", "eager_ratio_of_best", "eager_warm_s", "eager_cold_s", "eager_fp32_ratio")  # fmt: skip
    for name in timed:
        assert row[name] > 0, name
    assert row["rounds"] >= 3 and 0 < row["error"] < 1e-2
    assert {"peak_bytes", "eager_peak_bytes"} <= row.keys()
    assert result["ceilings"]["peak_flop_per_s"][row["isa"]]["fp32"] > 0
    assert result["ceilings"]["read_bytes_per_s"] > 0 and set(result["ceilings"]["torch_gemm_flop_per_s"]) == {
        "fp32",
        "bf16",
    }


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda,
                                        pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")])],
)  # fmt: skip
def test_bytes_are_held_against_the_memory_of_their_device(device, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import ceilings

    found = object.__new__(ceilings.Ceilings)
    found.threads = 1
    monkeypatch.setattr(ceilings, "_read", lambda where, size, read=ceilings._read: (where, read(device, size >> 8)))
    name, rate = found.bandwidth("cpu")
    assert name == "reading memory" and rate > 0
    name, (where, rate) = found.bandwidth("cuda")
    assert (name, where) == ("reading device memory", "cuda") and rate > 0


def test_a_read_that_misses_words_is_no_ceiling(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import ceilings

    whole = torch.sum
    monkeypatch.setattr(torch, "sum", lambda words, dim, out: whole(words[1:], dim, out=out))
    with pytest.raises(AssertionError, match="262144 words of 1 add up to 262143"):
        ceilings._read("cpu", 1 << 20)


def test_rows_without_their_device_say_so(small):
    rows = [row for row in small.result["rows"] if row["device"] == "cuda"]
    assert len(rows) == 2
    if not torch.cuda.is_available():
        assert all((row["status"], row["reason"]) == ("skipped", "no CUDA device") for row in rows)
        assert not any("warm_s" in row for row in rows)


def test_page_stands_alone_and_has_every_row(small):
    html = (small.folder / "bench.html").read_text()
    assert all(f"<td>{row['id']}</td>" in html for row in small.result["rows"])
    assert html.count('src="data:image/svg+xml') == 2
    assert not re.search(r'(src|href)="(?!data:)|<script|@import|url\(', html)


def test_output_in_a_pipe_is_plain_and_complete(small):
    assert not re.search("[\x1b\u2500-\u259f]", small.done.stdout)
    assert all(row["id"] in small.done.stdout for row in small.result["rows"])
    written = ["bench.html", "bench.json", "pytest-benchmark.json", "traces"]
    assert sorted(path.name for path in small.folder.iterdir()) == written
    details = json.loads((small.folder / "pytest-benchmark.json").read_text())
    assert {entry["extra_info"]["id"] for entry in details["benchmarks"]} == set(
        row["id"] for row in small.result["rows"] if row["status"] == "ok"
    )


def test_traces_show_the_ops_of_every_row_that_ran(small):
    found = {path.stem: json.loads(path.read_text()) for path in (small.folder / "traces").iterdir()}
    ran = [row["id"] for row in small.result["rows"] if row["status"] == "ok"]
    assert sorted(found) == sorted(name.replace("/", "-") for name in ran)
    for trace in found.values():
        assert {"limber_fast::info_nce_fwd", "limber_fast::info_nce_bwd"} <= {
            event.get("name") for event in trace["traceEvents"]
        }


def test_wrong_kernel_fails_before_any_time_is_shown(tmp_path):
    arguments = ("bench", "--quick", "--threads", "1", "-k", "width-N256-D64", "--output", str(tmp_path))
    done = run("-c", WRONG_KERNEL, *arguments)
    assert done.returncode == 1
    rows = {row["dtype"]: row for row in json.loads((tmp_path / "bench.json").read_text())["rows"]}
    for row in rows.values():
        assert row["status"] == "failed" and "wrong result of limber_fast" in row["reason"]
        assert not [key for key in row if key.endswith(("_s", "_ratio"))]
        assert row["reason"] in done.stderr and row["reason"] in done.stdout
    assert "of loss 1.0e-02" in rows["float32"]["reason"]
    assert re.search(r"of image gradient \d", rows["bfloat16"]["reason"])
    assert not re.search(r"\d m?s\b", done.stdout)


@pytest.mark.parametrize(("factor", "code"), [(1.05, 0), (0.5, 0), (1.2, 1)])
def test_gate_compares_ratios_to_eager(small, factor, code, tmp_path, monkeypatch, capsys):
    old = copy.deepcopy(small.result)
    worse = old["rows"][0]
    worse["eager_ratio"] *= factor
    for row in old["rows"]:
        row.pop("warm_s", None)  # absolute times are not compared
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert _gate(small, tmp_path, monkeypatch) == code
    assert (f"{worse['id']}: " in capsys.readouterr().err) == bool(code)


def test_gate_fails_where_a_row_ran_before_and_does_not_now(small, tmp_path, monkeypatch, capsys):
    (tmp_path / "old.json").write_text(json.dumps(small.result))
    now = copy.deepcopy(small.result["rows"])
    lost = next(row for row in now if row["status"] == "ok")
    del lost["eager_ratio"]
    lost |= {"status": "skipped", "reason": "no kernel of our own"}
    monkeypatch.setitem(small.result, "rows", now)
    assert _gate(small, tmp_path, monkeypatch) == 1
    assert f"{lost['id']}: " in (error := capsys.readouterr().err) and "skipped now: no kernel of our own" in error


def test_gate_tells_rows_left_out_for_time_and_does_not_hold_them_against_the_run(
    small, tmp_path, monkeypatch, capsys
):
    (tmp_path / "old.json").write_text(json.dumps(small.result))
    now = copy.deepcopy(small.result["rows"])
    ran = [row for row in now if row["status"] == "ok"]
    for row in ran[1:]:
        del row["eager_ratio"]
        row |= {"status": "skipped", "reason": "out of time: would have started after 2 minutes", "out_of_time": True}
    monkeypatch.setitem(small.result, "rows", now)
    assert _gate(small, tmp_path, monkeypatch, "--minutes", "2") == 0
    shown = capsys.readouterr()
    left_out = ", ".join(sorted(row["id"] for row in ran[1:]))
    assert shown.err == "" and f"not measured in this run: {left_out}" in shown.out
    assert f"{len(ran) - 1} of {len(now)} rows were left out: out of time (--minutes 2)" in shown.out
    del ran[0]["eager_ratio"]  # another reason: it is held against the run
    assert _gate(small, tmp_path, monkeypatch, "--minutes", "2") == 1


def test_rows_that_would_start_too_late_are_listed_as_left_out(small, tmp_path):
    done = run(
        "-m", "limber_fast", "bench", "--quick", "--threads", "1", "-k", SELECT, "--minutes", "1e-6", "--output",
        str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.endswith("limber-fast: --minutes 1e-06: no row could start in that time\n")
    rows = {row["id"]: row for row in json.loads((tmp_path / "bench.json").read_text())["rows"]}
    assert rows.keys() == {row["id"] for row in small.result["rows"]}
    for row in rows.values():
        assert row["status"] == "skipped" and "warm_s" not in row
        if row["device"] == "cuda" and not torch.cuda.is_available():
            assert row["reason"] == "no CUDA device"
        else:
            assert row["reason"] == "out of time: would have started after 1e-06 minutes"
            assert row["reason"] in (tmp_path / "bench.html").read_text() and row["op"] == "info_nce"


def test_a_row_that_started_in_time_is_measured_to_its_end(tmp_path):
    done = run(
        "-c", HOUR_LATER, "bench", "--quick", "--threads", "1", "-k", "width-N256-D64", "--minutes", "30", "--output",
        str(tmp_path),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    first, second = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert first["status"] == "ok" and first["eager_ratio"] > 0
    assert (second["status"], second["reason"]) == ("skipped", "out of time: would have started after 30 minutes")
    assert "1 of 2 rows were left out: out of time (--minutes 30)" in done.stdout


def test_gate_fails_where_nothing_is_in_common(small, tmp_path, monkeypatch, capsys):
    (tmp_path / "old.json").write_text(json.dumps({**small.result, "rows": []}))
    assert _gate(small, tmp_path, monkeypatch) == 1
    assert "no row with a ratio to eager in common" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 0, "rows": []}', '{"benchmarks": []}'])
def test_gate_refuses_a_foreign_file_before_it_runs(small, text, tmp_path, monkeypatch, capsys):
    (tmp_path / "old.json").write_text(text)
    assert _gate(small, tmp_path, monkeypatch) == 1
    assert "not a bench.json" in capsys.readouterr().err and not (tmp_path / "bench.json").exists()


def test_selecting_nothing_is_an_error(tmp_path):
    done = run("-m", "limber_fast", "bench", "-k", "abacus", "--output", str(tmp_path))
    assert done.returncode == 1 and "no benchmark matching -k 'abacus'" in done.stderr
    assert not list(tmp_path.iterdir())


def _gate(small, folder: Path, monkeypatch, *more: str) -> int:
    """The command with the small run's rows in place of a new run."""
    recorder = SimpleNamespace(rows=small.result["rows"], ceilings=small.result["ceilings"], broken=[])
    monkeypatch.setattr(bench, "_run", lambda args, console: (0, recorder))
    arguments = ["bench", "--output", str(folder), "--compare", str(folder / "old.json"), "--fail-over", "10%", *more]
    return cli.main(arguments)


def test_page_draws_the_seconds_of_a_question():
    common = {"op": "few_shot", "group": "reuse", "dtype": "bfloat16", "status": "ok", "w8a8": 1}
    rows = [{**common, "shape": {"shots": 4, "Q": q}, "warm_s": 1.0 + q / 10, "without_reuse_warm_s": 1.2 * q}
            for q in (1, 8, 32)]  # fmt: skip
    (chart,) = bench_html._charts(rows)
    assert "Seconds per question" in chart and "data:image/svg+xml" in chart
    failed = [{**row, "status": "failed"} for row in rows]
    assert "No row of a sweep" in bench_html._charts(failed)[0]
