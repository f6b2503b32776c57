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
_PLAIN_TARGET = re.compile(r"^(?:`?\(?\.?\w*\)?|)$")  # no predicate among the operands of a branch
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

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction can follow."""
        always = not self.guarded and self.opcode in ("BRA", "EXIT") and _PLAIN_TARGET.match(self.operands) is not None
        return not always

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
    """A kernel's code by how often a program runs it: the main loop, the loop around it, the one around that, the rest.

    Each without the loops within it; empty where there is none.
    """

    main: tuple[Instruction, ...]
    around: tuple[Instruction, ...]
    once: tuple[Instruction, ...]
    beyond: tuple[Instruction, ...] = ()


def sections(instructions: Sequence[Instruction], tensor_opcodes: Sequence[str], idle: bool = False) -> Sections:
    """Splits the code; what lies out of line behind the last exit is left out.

    The main loop is the innermost that has the most tensor-core instructions. Without any it is the shortest of all: a
    longer one may be an unrolled copy, which stands for several trips. Of the rest, only the way with the fewest
    instructions counts: a branch over some of them is taken.

    Args:
        idle: the way need not lead through the main loop: programs that find nothing to do.
    """
    code = _in_line(instructions)
    loops = [body for end in code if (body := _loop(code, end))]
    if not loops:
        return Sections((), (), shortest_way(code))

    def products(body: Sequence[Instruction]) -> int:
        return sum(one.opcode in tensor_opcodes for one in body)

    # A loop around another with products has those of its peeled trips as well.
    inner = [body for body in loops if not any(products(one) and _within(body, one) for one in loops)] or loops
    most = max(map(products, inner))
    main = min((body for body in inner if products(body) == most), key=len)
    enclosing = sorted((body for body in loops if most and _within(body, main)), key=len)
    outer = enclosing[0] if enclosing else main
    # A loop that begins where `outer` does is the same one by another way back.
    outermost = next((body for body in enclosing if body[0].address < outer[0].address), outer)
    once = _ways_past(code, outermost, exits=True)
    if idle and outer is not main:
        return Sections((), shortest_way(outermost), once)
    beyond = _ways_past(outermost, outer) if outermost is not outer else ()
    return Sections(main, _ways_past(outer, main), once, beyond)


def _in_line(instructions: Sequence[Instruction]) -> tuple[Instruction, ...]:
    """Up to the last exit, and past a guarded one to the way back that its loop ends with."""
    end = max((i for i, one in enumerate(instructions) if one.opcode == "EXIT"), default=len(instructions) - 1)
    while end + 1 < len(instructions) and instructions[end].falls_through:
        end += 1
    return tuple(instructions[: end + 1])


def shortest_way(code: Sequence[Instruction], exits: bool = False) -> tuple[Instruction, ...]:
    """From the first instruction to the last, with `exits` or to any exit, along forward branches: the fewest."""
    if not code:
        return ()
    place = {one.address: i for i, one in enumerate(code)}
    best: list[tuple[int, int]] = [(math.inf, -1)] * len(code)  # length so far, and whence
    best[0] = (1, -1)
    for i, one in enumerate(code[:-1]):
        length = best[i][0] + 1
        target = place.get(one.branch_target, -1)
        for after in (i + 1 if one.falls_through else -1, target):
            if after > i and length < best[after][0]:
                best[after] = (length, i)
    ends = [i for i, one in enumerate(code) if exits and one.opcode == "EXIT" and not one.falls_through]
    end = min((*ends, len(code) - 1), key=lambda i: best[i][0])
    if best[end][0] == math.inf:
        return tuple(code)
    way, i = [], end
    while i >= 0:
        way.append(code[i])
        i = best[i][1]
    return tuple(reversed(way))


def _ways_past(
    code: Sequence[Instruction], part: Sequence[Instruction], exits: bool = False
) -> tuple[Instruction, ...]:
    """The shortest ways from the start of `code` to `part` and from there to its end, without `part` itself."""
    start, end = (next(i for i, one in enumerate(code) if one.address == part[at].address) for at in (0, -1))
    return shortest_way(code[: start + 1])[:-1] + shortest_way(code[end:], exits)[1:]


def _within(outer: Sequence[Instruction], inner: Sequence[Instruction]) -> bool:
    return len(inner) < len(outer) and _contains(outer, inner)


def _contains(outer: Sequence[Instruction], inner: Sequence[Instruction]) -> bool:
    return outer[0].address <= inner[0].address and inner[-1].address <= outer[-1].address


def _loop(code: Sequence[Instruction], end: Instruction) -> tuple[Instruction, ...]:
    """What a backward branch repeats; it may be unconditional, with the way out in the middle. () for waits."""
    target = end.branch_target
    if target is None or target >= end.address:
        return ()
    body = tuple(one for one in code if target <= one.address <= end.address)
    return body if len(body) > _LONGEST_WAIT else ()
