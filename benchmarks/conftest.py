"""Fixtures of the benchmarks: `ceilings` of this machine, and `compare`, which makes one row of a workload."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import Workload, measure, trace

from limber_fast import dispatch, native

# tests/cases.py: the data and error measures that tests and benchmarks share. The repository root leaves the path:
# transformers would take kernels/ in it for a package that it knows.
_ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(_ROOT / "tests"), *(path for path in sys.path if Path(path or ".").resolve() != _ROOT)]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--trace-into", type=Path, help="folder for a torch.profiler trace of every row")
    parser.addoption("--start-within", type=float, metavar="SECONDS", help="leave out rows that would start later")


_STARTED = pytest.StashKey[float]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_STARTED] = time.monotonic()
    config.addinivalue_line("markers", "quick: part of `limber-fast bench --quick`")


@pytest.fixture(scope="session")
def ceilings():
    """Measured once, before the first row that can run."""
    from ceilings import Ceilings

    return Ceilings(torch.get_num_threads())


@pytest.fixture
def compare(
    request: pytest.FixtureRequest, benchmark: Any, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Workload], None]:
    """Runs a workload; the row travels in the test's `user_properties` and in pytest-benchmark's `extra_info`."""

    def run(workload: Workload) -> None:
        row = workload.identity()
        properties = request.node.user_properties
        properties.append(("row", row))
        backend, isa = _choose(workload, monkeypatch)
        within = request.config.getoption("start_within")
        if within is not None and time.monotonic() - request.config.stash[_STARTED] > within:
            row["out_of_time"] = True
            pytest.skip(f"out of time: would have started after {within / 60:g} minutes")
        limits = request.getfixturevalue("ceilings")
        properties.append(("ceilings", limits.facts()))
        budget = float(request.config.getoption("benchmark_max_time"))
        trial = workload.prepare(workload)

        def ceiling() -> tuple[str, float]:
            if trial.bound == "bytes":
                return limits.bandwidth(workload.device)
            return limits.peak(workload.device, isa, trial.arithmetic or workload.dtype)

        # Beside the row, for clocks change within minutes (by a twelfth on a shared Zen 5); the higher one counts.
        before = ceiling()
        peak = None if trial.bound == "bytes" or workload.device == "cuda" else lambda: ceiling()[1]
        columns = measure(trial, workload.device, benchmark, budget, workload.fewest_rounds, peak)
        name, rate = max(before, ceiling(), key=lambda found: found[1])
        row |= {"backend": backend, "isa": isa, "threads": limits.threads}
        if "warm_s" in columns:
            work, unit = (trial.bytes, "bytes") if trial.bound == "bytes" else (trial.flops, "flop")
            rate = max(rate, columns.get("ceiling_flop_per_s", 0))
            row |= {"ceiling": name, "ceiling_fraction": work / columns["warm_s"] / rate}
            columns |= {f"ceiling_{unit}_per_s": rate, "ceiling_fraction_of_best": work / columns["best_s"] / rate}
        row |= columns
        benchmark.extra_info |= row
        if folder := request.config.getoption("trace_into"):
            trace(trial.ours, workload.device, folder / f"{workload.id.replace('/', '-')}.json")

    return run


def _choose(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str | None]:
    """The backend and instruction set that `workload` will run on; skips where there is none of our own."""
    if workload.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if workload.isa:
        if reason := native.isa_refusal(workload.isa):
            pytest.skip(f"{workload.isa}: {reason}")
        monkeypatch.setenv(native.ISA_VARIABLE, workload.isa)
    backend, refused = dispatch.explain(workload.stem or workload.op, workload.device)
    if backend == "eager":
        reasons = "; ".join(f"{name}: {refused[name]}" for name in dispatch.ORDER[workload.device] if name in refused)
        pytest.skip(f"no kernel of our own ({reasons or 'eager was asked for'})")
    return backend, native.cpu_isa() if backend == "cpu" else None
