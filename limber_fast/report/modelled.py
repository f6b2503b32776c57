"""`limber-fast bench --modelled`: what the compiled kernels must take at least, from their code and a GPU's ceilings.

Nothing runs: a figure is a lower bound on time and no latency, since no GPU is busy all the time with its scarcest
resource. What it is good for is the order of limits, and which build needs less of the scarce one.

How a bound is made: `limber_fast.report.bounds`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from limber_fast import files
from limber_fast.console import Console
from limber_fast.kernels import catalogue
from limber_fast.kernels.catalogue import Case, Work
from limber_fast.report import steps
from limber_fast.report.aot import chips, compile_case, gate
from limber_fast.report.aot.build import Build
from limber_fast.report.aot.chips import CHIPS, Chip
from limber_fast.report.aot.pool import compile_ahead
from limber_fast.report.bounds import bound

FAILED = 1
LABEL = "modelled lower bound, no GPU run"


@dataclass(frozen=True)
class Entry:
    """A case of the catalogue and its place there."""

    file: str
    position: int
    case: Case
    work: Work


def main(args: argparse.Namespace, console: Console) -> int:
    """Compiles and prices every case for `args.modelled`, 'auto' being `chip_here()`; 1 where one fails the gate."""
    if importlib.util.find_spec("triton") is None:
        console.error("--modelled compiles the Triton kernels: pip install triton (Linux)")
        return FAILED
    target = chip_here() if args.modelled == "auto" else args.modelled
    chosen = select(target, args.select)
    passes = steps.select(target, args.select)
    if not chosen and not passes:
        console.error(f"no kernel with {args.select!r} in its name" if args.select else f"no kernel for {target}")
        return FAILED

    with console.progress(f"compiling for {target}", total=len(chosen)) as update:
        places = [(one.file, one.position) for one in chosen]
        for done, name in enumerate(compile_ahead(target, places, _catalogue_of(target)), 1):
            update(done, kernel=name)
    rows, failures = [], []
    for one in chosen:
        build = compile_case(one.case, target)
        if target in CHIPS:
            failures += gate(one.case, target)
            rows.append(row(one, build, CHIPS[target]))
        else:
            rows.append(_needs(one, build))

    priced = [steps.price(name, launches, target) for name, launches in passes.items()]

    args.output.mkdir(parents=True, exist_ok=True)
    result = {"label": LABEL, "target": target, "ceilings": ceilings(target), "rows": rows, "steps": priced,
              "failures": failures}  # fmt: skip
    path = args.output / f"modelled-{target}.json"
    files.replace(path, json.dumps(result, indent=1, allow_nan=False) + "\n")
    _print(console, result)
    console.print(f"wrote {path}", markup=False)
    for failure in failures:
        console.error(failure)
    return FAILED if failures else 0


def chip_here() -> str:
    """The listed chip with the current CUDA device's compute capability, or with its major one (of 8.x all but 8.0 have
    the shared memory of 8.9); sm_90 without such a device.
    """
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "sm_90"
    major, minor = torch.cuda.get_device_capability()
    if major == 8:
        return "sm_89" if minor else "sm_80"
    return next((name for name, chip in CHIPS.items() if chip.capability // 10 == major), "sm_90")


def select(target: str, part: str | None) -> list[Entry]:
    """What has `part` in its name."""
    return [
        Entry(file, position, case, work)
        for file, listed in catalogue.cases(_catalogue_of(target)).items()
        for position, (case, work) in enumerate(listed)
        if part is None or part in case.name
    ]


def _catalogue_of(target: str) -> str:
    """An AMD target takes the cases of sm_80, which need no tensor memory accelerator."""
    return target if target in CHIPS else "sm_80"


def row(entry: Entry, build: Build, chip: Chip) -> dict[str, Any]:
    """One line of the report as flat values; seconds are modelled."""
    found = bound(build, entry.work, chip)
    fitting = chips.occupancy(chip, build.registers, build.shared, build.threads)
    return _needs(entry, build) | {
        "blocks_per_sm": fitting.blocks,
        "warps_per_sm": fitting.warps,
        "occupancy_limiter": fitting.limiter,
        "modelled_floor_s": found.floor,
        "serial_tensor_share": found.serial,
        "limiter": found.limiter,
        "limiter_source": source(found.limiter, chip),
        "l2_demand": entry.work.l2_bytes / found.floor,
        "modelled_s_by_resource": dict(found.seconds),
    }


def source(resource: str, chip: Chip) -> str:
    """Where the ceiling of a resource comes from; a pipe of an SM is as fast as the clock."""
    rates = {"tensor": chip.tensor, "DRAM": chip.dram, "L2": chip.l2}
    return rates.get(resource, chip.clock).source


def ceilings(target: str) -> dict[str, Any]:
    """The rates behind the bounds, each with its source; empty for an AMD target, which gets none."""
    if target not in CHIPS:
        return {}
    chip = CHIPS[target]
    rates = {name: asdict(getattr(chip, name)) for name in ("tensor", "dram", "l2", "clock")}
    lanes = {name: getattr(chip, f"{name}_lanes") for name in ("mufu", "fp32", "alu", "shared")}
    guide = {"value": lanes, "source": "CUDA C++ Programming Guide, arithmetic throughput"}
    return {"chip": chip.name, **rates, "lanes_per_cycle": guide}


def _needs(entry: Entry, build: Build) -> dict[str, Any]:
    return {
        "file": entry.file, "case": entry.case.name, "shape": entry.work.shape, "registers": build.registers,
        "spills": build.spill_loads + build.spill_stores, "shared_bytes": build.shared, "threads": build.threads,
        "tensor_core": build.tensor_core, "async_copies": build.async_copies,
    }  # fmt: skip


def _print(console: Console, result: Mapping[str, Any]) -> None:
    target, rates = result["target"], result["ceilings"]
    if not rates:
        console.table(f"{target}: compiled for information, no bounds", *_table(result["rows"], ()))
        return
    resources = ("tensor", "DRAM", "L2", "MUFU", "FP32", "ALU", "shared memory", "issue")
    console.table(f"{target} ({rates['chip']}): {LABEL}", *_table(result["rows"], resources))
    for one in result["steps"]:
        steps.show(console, one, LABEL)
    console.print("Columns of resources: share of the floor. Ceilings, with their source:", markup=False)
    for name, unit in (("tensor", "flop/s, 16-bit"), ("dram", "byte/s"), ("l2", "byte/s"), ("clock", "Hz")):
        console.print(f"  {name} {rates[name]['value']:.4g} {unit} ({rates[name]['source']})", markup=False)
    lanes = ", ".join(f"{pipe} {count}" for pipe, count in rates["lanes_per_cycle"]["value"].items())
    console.print(f"  lanes per cycle and SM: {lanes} ({rates['lanes_per_cycle']['source']})", markup=False)


def _table(rows: Sequence[Mapping[str, Any]], resources: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    header = ["kernel", "shape", "registers", "spills", "shared KB"]
    if resources:
        header += ["blocks/SM", "kept by", "floor us", "limiter", "serial", "L2 TB/s", *resources]
    return header, [_cells(one, resources) for one in rows]


def _cells(one: Mapping[str, Any], resources: Sequence[str]) -> list[str]:
    cells = [one["case"], one["shape"], str(one["registers"]), str(one["spills"]), f"{one['shared_bytes'] / 1024:.1f}"]
    if not resources:
        return cells
    seconds, floor = one["modelled_s_by_resource"], one["modelled_floor_s"]
    limiter = f"{one['limiter']} ({one['limiter_source']})"
    shares = [f"{seconds[name] / floor:.0%}" if name in seconds else "-" for name in resources]
    more = [f"{floor * 1e6:.1f}", limiter, f"{one['serial_tensor_share']:.0%}", f"{one['l2_demand'] / 1e12:.1f}"]
    return [*cells, str(one["blocks_per_sm"]), one["occupancy_limiter"], *more, *shares]
