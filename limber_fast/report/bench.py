"""`limber-fast bench`: runs the benchmarks under pytest and writes bench.json, bench.html and pytest-benchmark's JSON.

The quoted figures are ratios to eager PyTorch in the same process, so two runs can be compared: `--compare`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch

from limber_fast import environment, files
from limber_fast.console import Console
from limber_fast.report import bench_html

SCHEMA = 1
SECONDS_PER_ROW, SECONDS_PER_QUICK_ROW = 1.5, 0.4
FAILED = 1
_SMALLEST_COST = 2e9  # for the progress bar: what any row costs, in floating-point operations


class Recorder:
    """The pytest plugin that collects rows and moves the progress bar."""

    def __init__(self, update: Callable[..., None]) -> None:
        self.rows: list[dict[str, Any]] = []
        self.ceilings: dict[str, Any] = {}
        self.broken: list[str] = []
        self._update = update
        self._cost: dict[str, float] = {}
        self._done = 0.0

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.broken.append(f"{report.nodeid}: {_last_line(report.longreprtext)}")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            workload = item.callspec.params.get("workload") if hasattr(item, "callspec") else None
            self._cost[item.nodeid] = _SMALLEST_COST + getattr(workload, "cost", 0.0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        found = dict(report.user_properties)
        self.ceilings = found.get("ceilings", self.ceilings)
        row = found.get("row", {"id": report.nodeid})
        self.rows.append({**row, "status": "ok" if report.passed else report.outcome, "reason": _reason(report)})
        self._done += self._cost[report.nodeid]
        shown = {"row": row["id"]} | ({"ratio": row["eager_ratio"]} if "eager_ratio" in row else {})
        self._update(self._done / sum(self._cost.values()), **shown)


def main(args: argparse.Namespace, console: Console) -> int:
    """Runs the benchmarks in `args.benchmarks`; 0, or 1 where a row failed or fell by more than `args.fail_over`, or
    where `args.minutes` sufficed for none."""
    if importlib.util.find_spec("pytest_benchmark") is None:
        raise ModuleNotFoundError("no pytest-benchmark", name="pytest-benchmark")
    old = None
    if args.compare is not None:  # before the run: it takes minutes, and may overwrite this very file
        try:
            old = load(args.compare)
        except ValueError as error:
            console.error(f"--compare {args.compare}: {error}")
            return FAILED
    args.output.mkdir(parents=True, exist_ok=True)

    code, recorder = _run(args, console)
    if recorder.broken or not recorder.rows:
        matching = f" matching -k {args.select!r}" if args.select else ""
        for line in recorder.broken or [f"no benchmark{matching} (pytest exit code {code:d})"]:
            console.error(line)
        return FAILED

    result = _result(args, recorder)
    files.replace(args.output / "bench.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    files.replace(args.output / "bench.html", bench_html.render(result))
    console.table("Benchmarks", *bench_html.brief(result["rows"]))
    console.print(f"wrote {args.output / 'bench.html'} and bench.json", markup=False)

    late = sum("out_of_time" in row for row in result["rows"])
    if late:
        console.print(f"{late} of {len(result['rows'])} rows were left out: out of time (--minutes {args.minutes:g})")
    failed = [row for row in result["rows"] if row["status"] == "failed"]
    for row in failed:
        console.error(f"{row['id']}: {row['reason']}")
    nothing = late and not any(row["status"] == "ok" for row in result["rows"])
    if nothing:
        console.error(f"--minutes {args.minutes:g}: no row could start in that time")
    held = old is None or _hold_against(old, result, args.fail_over, console)
    return FAILED if failed or nothing or not held else 0


def load(path: Path) -> dict[str, Any]:
    """An earlier run's bench.json. Raises ValueError where the file is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ValueError("not a bench.json: not text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not a bench.json: {error}") from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA or not isinstance(found.get("rows"), list):
        raise ValueError(f"not a bench.json of schema {SCHEMA}; write one with `limber-fast bench`")
    return found


def ratios(result: dict[str, Any]) -> dict[str, float]:
    """Ratio to eager by row id, of the rows that have one."""
    return {row["id"]: row["eager_ratio"] for row in result["rows"] if row.get("eager_ratio") is not None}


def regressions(old: dict[str, Any], new: dict[str, Any], limit: float) -> list[tuple[str, float, float]]:
    """(id, old, new) of the ratios to eager that fell by more than the share `limit`."""
    before, now = ratios(old), ratios(new)
    return [(row, before[row], now[row]) for row in before if row in now and now[row] < before[row] * (1 - limit)]


def _run(args: argparse.Namespace, console: Console) -> tuple[int, Recorder]:
    seconds = SECONDS_PER_QUICK_ROW if args.quick else SECONDS_PER_ROW
    details = args.output / "pytest-benchmark.json"
    partial = details.with_name(f".{details.name}.{os.getpid()}.tmp")  # pytest-benchmark empties its file at once
    options = [
        # Nothing of the project's own pytest settings, no terminal output but ours, nothing written beside the results.
        str(args.benchmarks), "-o", "addopts=", "-o", "python_files=bench_*.py", "-p", "no:terminal",
        "-p", "no:cacheprovider", "--capture=no", "--benchmark-enable", "--benchmark-quiet",
        f"--benchmark-max-time={seconds}", f"--benchmark-json={partial}",
    ]  # fmt: skip
    options += ["-m", "quick"] if args.quick else []
    options += ["-k", args.select] if args.select else []
    options += [f"--trace-into={args.output / 'traces'}"] if args.trace else []
    options += [f"--start-within={60 * args.minutes}"] if args.minutes else []
    try:
        with _threads(args.threads), console.progress("benchmarks", total=1.0) as update:
            recorder = Recorder(update)
            code = pytest.main(options, plugins=[recorder])
        if code == pytest.ExitCode.INTERRUPTED and not recorder.broken:
            raise KeyboardInterrupt
        if partial.exists() and partial.stat().st_size:
            os.replace(partial, details)
    finally:
        partial.unlink(missing_ok=True)
    return code, recorder


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _result(args: argparse.Namespace, recorder: Recorder) -> dict[str, Any]:
    machine = environment.collect()
    facts = ("platform", "versions", "environment", "cpu", "cuda")  # the others hold paths of this machine
    return {
        "schema": SCHEMA,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "options": {"quick": args.quick, "select": args.select, "minutes": args.minutes},
        "machine": {fact: machine[fact] for fact in facts},
        "threads": args.threads or torch.get_num_threads(),
        "ceilings": recorder.ceilings,
        "rows": recorder.rows,
    }


def _hold_against(old: dict[str, Any], new: dict[str, Any], limit: float | None, console: Console) -> bool:
    """Prints both runs' ratios; False where one fell by more than `limit` or a row that had one ran no more, other than
    for want of time, or where there is nothing to compare."""
    before, now = ratios(old), ratios(new)
    common = [row for row in before if row in now]
    console.table(
        f"Ratios to eager against the run of {old['created']}",
        ("row", "old", "new", "change"),
        [(row, f"{before[row]:.2f}x", f"{now[row]:.2f}x", f"{now[row] / before[row] - 1:+.1%}") for row in common],
    )
    for name, one, other in (
        ("CPU", old["machine"]["cpu"]["model"], new["machine"]["cpu"]["model"]),
        ("kernels", old["machine"]["cpu"]["isa"], new["machine"]["cpu"]["isa"]),
        ("number of threads", old["threads"], new["threads"]),
        ("GPU", _devices(old), _devices(new)),
    ):
        if one != other:
            console.print(f"the runs differ in {name}: {one} then, {other} now", markup=False)
    if absent := sorted(before.keys() - now.keys()):
        console.print(f"not measured in this run: {', '.join(absent)}", markup=False)
    if limit is None:
        return True
    if not common:
        console.error("--compare: the runs have no row with a ratio to eager in common")
        return False
    unmeasured = [row for row in new["rows"] if row["id"] in before.keys() - now.keys() and "out_of_time" not in row]
    for row in unmeasured:
        console.error(f"{row['id']}: {before[row['id']]:.2f}x of eager before, {row['status']} now: {row['reason']}")
    fallen = regressions(old, new, limit)
    for row, then, here in fallen:
        console.error(f"{row}: {here:.2f}x of eager, was {then:.2f}x: fell by {1 - here / then:.1%}, over {limit:.0%}")
    return not fallen and not unmeasured


def _devices(result: dict[str, Any]) -> str:
    return ", ".join(device["name"] for device in result["machine"]["cuda"]["devices"]) or "none"


def _reason(report: pytest.TestReport) -> str | None:
    if report.passed:
        return None
    if report.skipped:
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return crash.message.splitlines()[0] if crash else _last_line(report.longreprtext)


def _last_line(text: str) -> str:
    return next(reversed(text.strip().splitlines()), "failed")
