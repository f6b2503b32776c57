"""Reads disassembled GPU code: which instructions, how wide, and which of them are the main loop."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

_LINE = re.compile(
    r"^\s*/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<guard>@!?U?P\w+\s+)?(?P<text>[A-Z][^;]*?)\s*;", re.MULTILINE
)
_TARGET = re.compile(r"\b0x([0-9a-f]+)\b")
# HGMMA.64x128x16 names M, N, K of a warp group's product; HMMA.16816 those of a warp's: M 16, N 8, K the rest.
_GROUP_SHAPE = re.compile(r"\.(\d+)x(\d+)x(\d+)\b")
_WARP_SHAPE = re.compile(r"^[HI]MMA\.(16)(8)(\d+)\b")
_WARPS_IN_GROUP = 4
_LONGEST_WAIT = 5  # instructions of a loop that polls a barrier


@dataclass(frozen=True)
class Instruction:
    """One line of disassembly; `name` is the mnemonic with its modifiers, `opcode` without."""

    address: int
    guarded: bool
    name: str
    operands: str

    @property
    def opcode(self) -> str:
        return self.name.partition(".")[0]

    @cached_property
    def branch_target(self) -> int | None:
        found = _TARGET.search(self.operands) if self.opcode == "BRA" else None
        return int(found[1], 16) if found else None

    def product_flops(self) -> float:
        """Operations per warp of a tensor-core instruction whose name says its shape, else 0."""
        if (shape := _GROUP_SHAPE.search(self.name)) is not None:
            return 2 * math.prod(map(int, shape.groups())) / _WARPS_IN_GROUP
        if (shape := _WARP_SHAPE.match(self.name)) is not None:
            return 2 * math.prod(map(int, shape.groups()))
        return 0.0


def parse(disassembly: str) -> tuple[Instruction, ...]:
    """Instructions in order, from the text that `cuobjdump -sass` prints for one kernel."""
    found = []
    for line in _LINE.finditer(disassembly):
        name, _, operands = line["text"].partition(" ")
        found.append(Instruction(int(line["address"], 16), line["guard"] is not None, name, operands))
    return tuple(found)


def histogram(instructions: Sequence[Instruction]) -> Counter[str]:
    """Number of instructions by opcode."""
    return Counter(instruction.opcode for instruction in instructions)


@dataclass(frozen=True)
class Sections:
    """A kernel's code by how often a program runs it: the main loop, the loop around it if any, and the rest."""

    main: tuple[Instruction, ...]
    around: tuple[Instruction, ...]
    once: tuple[Instruction, ...]


def sections(instructions: Sequence[Instruction], tensor_opcodes: Sequence[str]) -> Sections:
    """Splits the code; what lies out of line behind the last exit is left out.

    The main loop is the shortest that has the most tensor-core instructions. Without any it is the shortest of all: a
    longer one may be an unrolled copy, which stands for several trips.
    """
    exits = [i for i, one in enumerate(instructions) if one.opcode == "EXIT" and not one.guarded]
    code = tuple(instructions[: exits[-1] + 1]) if exits else tuple(instructions)
    loops = [body for end in code if (body := _loop(code, end))]
    if not loops:
        return Sections((), (), code)

    def products(body: Sequence[Instruction]) -> int:
        return sum(one.opcode in tensor_opcodes for one in body)

    most = max(map(products, loops))
    main = min((body for body in loops if products(body) == most), key=len)
    enclosing = [body for body in loops if len(body) > len(main) and _contains(body, main)] if most else []
    outer = min(enclosing, key=len, default=main)
    return Sections(main, _without(outer, main), _without(code, outer))


def _contains(outer: Sequence[Instruction], inner: Sequence[Instruction]) -> bool:
    return outer[0].address <= inner[0].address and inner[-1].address <= outer[-1].address


def _without(code: Sequence[Instruction], part: Sequence[Instruction]) -> tuple[Instruction, ...]:
    return tuple(one for one in code if not part[0].address <= one.address <= part[-1].address)


def _loop(code: Sequence[Instruction], end: Instruction) -> tuple[Instruction, ...]:
    """What a backward branch repeats; it may be unconditional, with the way out in the middle. () for waits."""
    target = end.branch_target
    if target is None or target >= end.address:
        return ()
    body = tuple(one for one in code if target <= one.address <= end.address)
    return body if len(body) > _LONGEST_WAIT else ()
