"""`limber-fast bench --modelled`: what the compiled kernels must take at least, from their code and a GPU's ceilings.

Nothing runs: a figure is a lower bound on time and no latency, since no GPU is busy all the time with its scarcest
resource. What it is good for is the order of limits, and which build needs less of the scarce one.

Per launch, the largest of
    tensor         flop of the busiest SM / its share of the tensor cores' rate
    DRAM, L2       bytes / bandwidth
    MUFU, FP32, ALU, shared memory    instructions of the busiest SM x 32 lanes / lanes per cycle / clock
    issue          all its instructions / 4 per cycle / clock
Instructions are read from the code: the main loop's once per trip, those of a loop around it once per outer trip, the
others once. A branch that skips some of them is not seen.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from limber_fast.console import Console
from limber_fast.kernels import catalogue
from limber_fast.kernels.catalogue import Case, Work
from limber_fast.report import page
from limber_fast.report.aot import chips, compile_case, gate, sass
from limber_fast.report.aot.build import Build
from limber_fast.report.aot.chips import CHIPS, WARP, Chip
from limber_fast.report.aot.pool import compile_ahead

FAILED = 1
LABEL = "modelled lower bound, no GPU run"
ISSUE_PER_CYCLE = 4  # one instruction per sub-partition
TENSOR_SPEED = {"bf16": 1.0, "fp16": 1.0, "tf32": 0.5, "int8": 2.0, "fp8": 2.0}  # of the 16-bit rate
_FP32 = frozenset(("FADD", "FMUL", "FFMA"))
_ALU = frozenset(
    ("FMNMX", "FSEL", "FSETP", "IADD3", "IMNMX", "ISETP", "LEA", "LOP3", "PRMT", "SEL", "SHF", "VIADD", "VIMNMX")
)
_SHARED = frozenset(("LDS", "LDSM", "SHFL", "STS", "STSM"))
_WORDS = re.compile(r"\.(?:(?P<bits>64|128)|M\w*88\.(?P<matrices>[24]))\b")


@dataclass(frozen=True)
class Entry:
    """A case of the catalogue and its place there."""

    file: str
    position: int
    case: Case
    work: Work


@dataclass(frozen=True)
class Bound:
    """The modelled floor of one launch: seconds by resource, the scarcest first."""

    seconds: Mapping[str, float]

    @property
    def limiter(self) -> str:
        return next(iter(self.seconds))

    @property
    def floor(self) -> float:
        return self.seconds[self.limiter]


def bound(build: Build, work: Work, chip: Chip) -> Bound:
    """The lower bound of one launch; `Work` says what is counted."""
    share = math.ceil(work.programs / chip.sms)  # a program does not leave its SM
    cycles = _cycles(build, work, chip)
    seconds = {pipe: share * count / chip.clock.value for pipe, count in cycles.items()}
    flops = work.flops / work.programs * share * chip.sms
    if work.dtype in TENSOR_SPEED:
        seconds["tensor"] = flops / (chip.tensor.value * TENSOR_SPEED[work.dtype])
    else:
        seconds["FP32"] = max(seconds["FP32"], flops / (2 * chip.fp32_lanes * chip.sms * chip.clock.value))
    seconds |= {"DRAM": work.dram_bytes / chip.dram.value, "L2": work.l2_bytes / chip.l2.value}
    return Bound(dict(sorted(seconds.items(), key=lambda item: -item[1])))


def _cycles(build: Build, work: Work, chip: Chip) -> dict[str, float]:
    """Cycles of one program by pipe of its SM."""
    code = sass.sections(build.instructions, (*chip.tensor_instructions, *chips.WARP_PRODUCTS))
    parts = ((code.main, _trips(build, work, code)), (code.around, work.outer_trips), (code.once, 1))
    warps = build.threads / WARP
    lanes = {
        "MUFU": chip.mufu_lanes,
        "FP32": chip.fp32_lanes,
        "ALU": chip.alu_lanes,
        "shared memory": chip.shared_lanes,
    }
    cycles = dict.fromkeys((*lanes, "issue"), 0.0)
    for instructions, times in parts:
        for one in instructions:
            cycles["issue"] += times * warps / ISSUE_PER_CYCLE
            if (pipe := _pipe(one)) is not None:
                cycles[pipe] += times * warps * WARP * _words(one) / lanes[pipe]
    return cycles


def _trips(build: Build, work: Work, code: sass.Sections) -> float:
    """Trips of the main loop, from the products in it where their shape is known: the compiler may have unrolled it."""
    warps = build.threads / WARP
    per_trip = warps * sum(one.product_flops() for one in code.main)
    if not per_trip:
        return work.loop_trips
    elsewhere = warps * (
        work.outer_trips * sum(one.product_flops() for one in code.around)
        + sum(one.product_flops() for one in code.once)
    )
    return max(work.flops / work.programs - elsewhere, 0.0) / per_trip


def _pipe(instruction: sass.Instruction) -> str | None:
    pipes = {"MUFU": frozenset(("MUFU",)), "FP32": _FP32, "ALU": _ALU, "shared memory": _SHARED}
    return next((pipe for pipe, opcodes in pipes.items() if instruction.opcode in opcodes), None)


def _words(instruction: sass.Instruction) -> int:
    """32-bit words per lane of an access to shared memory; 1 for any other instruction."""
    found = _WORDS.search(instruction.name) if instruction.opcode in _SHARED else None
    if found is None:
        return 1
    return int(found["bits"]) // 32 if found["bits"] else int(found["matrices"])


# --- the command ----------------------------------------------------------------------------------------------------


def main(args: argparse.Namespace, console: Console) -> int:
    """Compiles and prices every case for `args.modelled`; 1 where one fails the gate."""
    if importlib.util.find_spec("triton") is None:
        console.error("--modelled compiles the Triton kernels: pip install triton (Linux)")
        return FAILED
    target = args.modelled
    chosen = select(target, args.select)
    if not chosen:
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

    args.output.mkdir(parents=True, exist_ok=True)
    result = {"label": LABEL, "target": target, "ceilings": ceilings(target), "rows": rows, "failures": failures}
    path = args.output / f"modelled-{target}.json"
    page.write_text(path, json.dumps(result, indent=1, allow_nan=False) + "\n")
    _print(console, result)
    console.print(f"wrote {path}", markup=False)
    for failure in failures:
        console.error(failure)
    return FAILED if failures else 0


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
        "limiter": found.limiter,
        "limiter_source": source(found.limiter, chip),
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
    console.print("Columns of resources: share of the floor. Ceilings, with their source:", markup=False)
    for name, unit in (("tensor", "flop/s, 16-bit"), ("dram", "byte/s"), ("l2", "byte/s"), ("clock", "Hz")):
        console.print(f"  {name} {rates[name]['value']:.4g} {unit} ({rates[name]['source']})", markup=False)
    lanes = ", ".join(f"{pipe} {count}" for pipe, count in rates["lanes_per_cycle"]["value"].items())
    console.print(f"  lanes per cycle and SM: {lanes} ({rates['lanes_per_cycle']['source']})", markup=False)


def _table(rows: Sequence[Mapping[str, Any]], resources: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    header = ["kernel", "shape", "registers", "spills", "shared KB"]
    if resources:
        header += ["blocks/SM", "kept by", "floor us", "limiter", *resources]
    return header, [_cells(one, resources) for one in rows]


def _cells(one: Mapping[str, Any], resources: Sequence[str]) -> list[str]:
    cells = [one["case"], one["shape"], str(one["registers"]), str(one["spills"]), f"{one['shared_bytes'] / 1024:.1f}"]
    if not resources:
        return cells
    seconds, floor = one["modelled_s_by_resource"], one["modelled_floor_s"]
    limiter = f"{one['limiter']} ({one['limiter_source']})"
    shares = [f"{seconds[name] / floor:.0%}" if name in seconds else "-" for name in resources]
    return [*cells, str(one["blocks_per_sm"]), one["occupancy_limiter"], f"{floor * 1e6:.1f}", limiter, *shares]
