"""Lower bounds on the time of one launch, from the code of a build, the work of the launch and a GPU's ceilings.

Per launch, the largest of
    tensor         flop of the busiest SM / its share of the tensor cores' rate
    DRAM, L2       bytes / bandwidth
    MUFU, FP32, ALU, shared memory    instructions of the busiest SM x 32 lanes / lanes per cycle / clock
    issue          all its instructions / 4 per cycle / clock
Instructions are read from the code: the main loop's once per trip, those of a loop around it once per trip of its own,
the others once, and of branches the way with the fewest instructions.

Bytes asked of the L2 cache are priced at the SMs' own ports to it, which all of them pass. What the cache itself
delivers is less, by nobody knows how much: from sm_90 on a coalescer before it merges reads of several SMs for the same
line (NVIDIA Nsight Compute, hardware units: LRC), and neighbouring tiles ask for the same operands together. So a
bandwidth measured with reads that share nothing is no ceiling here; the demand is shown instead.

"Serial" is the share of the tensor cores' rate that is left if nothing at all hides the code around the main loop.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from limber_fast.kernels.catalogue import Work
from limber_fast.report.aot import chips, sass
from limber_fast.report.aot.build import Build
from limber_fast.report.aot.chips import WARP, Chip

ISSUE_PER_CYCLE = 4  # one instruction per sub-partition
TENSOR_SPEED = {"bf16": 1.0, "fp16": 1.0, "tf32": 0.5, "int8": 2.0, "fp8": 2.0}  # of the 16-bit rate
_FP32 = frozenset(("FADD", "FMUL", "FFMA"))
_ALU = frozenset(
    ("FMNMX", "FSEL", "FSETP", "IADD3", "IMNMX", "ISETP", "LEA", "LOP3", "PRMT", "SEL", "SHF", "VIADD", "VIMNMX")
)
_SHARED = frozenset(("LDS", "LDSM", "SHFL", "STS", "STSM"))
_WORDS = re.compile(r"\.(?:(?P<bits>64|128)|M\w*88\.(?P<matrices>[24]))\b")


@dataclass(frozen=True)
class Bound:
    """The modelled floor of one launch: seconds by resource, the scarcest first."""

    seconds: Mapping[str, float]
    around: float = 0.0  # of the code around the main loop alone, by its scarcest pipe

    @property
    def serial(self) -> float:
        """Share of the tensor cores' rate if that code hides under no product; 0 for a launch without products."""
        tensor = self.seconds.get("tensor", 0.0)
        return tensor / (self.floor + self.around) if tensor else 0.0

    @property
    def limiter(self) -> str:
        return next(iter(self.seconds))

    @property
    def floor(self) -> float:
        return self.seconds[self.limiter]


def bound(build: Build, work: Work, chip: Chip) -> Bound:
    """The lower bound of one launch; `Work` says what is counted."""
    share = math.ceil(work.programs / chip.sms)  # a program does not leave its SM
    main, around = _cycles(build, work, chip)
    seconds = {pipe: share * (main[pipe] + around[pipe]) / chip.clock.value for pipe in main}
    flops = work.flops / work.programs * work.imbalance * share * chip.sms
    if work.dtype in TENSOR_SPEED:
        seconds["tensor"] = flops / (chip.tensor.value * TENSOR_SPEED[work.dtype])
    else:
        seconds["FP32"] = max(seconds["FP32"], flops / (2 * chip.fp32_lanes * chip.sms * chip.clock.value))
    seconds |= {"DRAM": work.dram_bytes / chip.dram.value, "L2": work.l2_bytes / chip.l2.value}
    alone = share * max(around.values()) / chip.clock.value
    return Bound(dict(sorted(seconds.items(), key=lambda item: -item[1])), alone)


def _cycles(build: Build, work: Work, chip: Chip) -> tuple[dict[str, float], dict[str, float]]:
    """Cycles of one program by pipe of its SM: in the main loop, and around it."""
    opcodes = (*chip.tensor_instructions, *chips.WARP_PRODUCTS)
    code = sass.sections(build.instructions, opcodes, idle=not work.flops)
    warps = build.threads / WARP
    lanes = {
        "MUFU": chip.mufu_lanes,
        "FP32": chip.fp32_lanes,
        "ALU": chip.alu_lanes,
        "shared memory": chip.shared_lanes,
    }
    main, around = (dict.fromkeys((*lanes, "issue"), 0.0) for _ in range(2))
    for cycles, instructions, times in (
        (main, code.main, _trips(build, work, code)), (around, code.around, work.outer_trips),
        (around, code.beyond, work.outermost_trips), (around, code.once, 1),
    ):  # fmt: skip
        for one in instructions:
            cycles["issue"] += times * warps / ISSUE_PER_CYCLE
            if (pipe := _pipe(one)) is not None:
                cycles[pipe] += times * warps * WARP * _words(one) / lanes[pipe]
    return main, around


def _trips(build: Build, work: Work, code: sass.Sections) -> float:
    """Trips of the main loop, from the products in it where their shape is known: the compiler may have unrolled it."""
    warps = build.threads / WARP
    per_trip = warps * sum(one.product_flops() for one in code.main)
    if not per_trip:
        return work.loop_trips
    elsewhere = warps * (
        work.outer_trips * sum(one.product_flops() for one in code.around)
        + work.outermost_trips * sum(one.product_flops() for one in code.beyond)
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
