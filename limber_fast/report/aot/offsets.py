"""Finds row offsets that are computed in 32 bits, in the Triton IR of a kernel.

A tower of 2**22 rows and 512 columns has 2**31 elements: `row * stride` in 32 bits then addresses memory before the
tensor. No test on a small problem shows it, so the code is checked by a rule. Every integer that reaches an address is

    bounded   made of constants and tl.arange alone
    index     counts blocks, programs or rows of an argument: a program id, a scalar argument, a quotient
    position  counts elements: an index times a constant, a loaded number, a counter that a loop advances

and a 32-bit product on the way to an address may only be bounded * bounded, or bounded * index with no factor above
`MAX_TILE`: a block's first row (`pid * BLOCK_M`) or a tile's own pitch (`tl.arange(...) * stride`), both below 2**31.
Refused: a product of two runtime values, and a position times anything; those need `.to(tl.int64)` first. The sum of
positions is not checked: a row number itself is taken to fit.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field

MAX_TILE = 4096
LIMIT = 2**31
BOUNDED, INDEX, POSITION = range(3)

_NAME = re.compile(r"%[\w$.-]+(?:#\d+)?")
_STATEMENT = re.compile(r'^(?:(?P<results>%[^=]+?) = )?"?(?P<op>[a-z_]+\.[\w.]+)"?(?P<rest>.*)$')
_FOR = re.compile(
    r"(?P<index>%\S+) = (?P<low>%\S+) to (?P<high>%\S+) step (?P<step>%\S+)(?: iter_args\((?P<args>.*?)\))?"
)
_INDEX_OPS = ("tt.get_program_id", "tt.get_num_programs")
_QUOTIENTS = ("arith.divsi", "arith.divui", "arith.ceildivsi", "arith.floordivsi")
_REMAINDERS = ("arith.remsi", "arith.remui")
_OPAQUE = ("tt.load", "tt.call", "scf.while", "tt.atomic_rmw", "tt.atomic_cas", "tt.descriptor_load")


@dataclass(frozen=True)
class Extent:
    """How large a value can be: its level, and where it is bounded the bound."""

    level: int
    bound: int = 0

    def join(self, other: Extent) -> Extent:
        return Extent(max(self.level, other.level), max(self.bound, other.bound))


@dataclass
class _Statement:
    op: str
    text: str
    operands: list[str]
    line: str
    yields: list[list[str]] = field(default_factory=list)


def narrow_offsets(ttir: str) -> list[str]:
    """One line per 32-bit product that can overflow and reaches an address; empty where there is none."""
    return _Module(ttir).narrow_offsets()


class _Module:
    def __init__(self, ttir: str) -> None:
        self._statements: dict[str, tuple[_Statement, int]] = {}  # by the name of a result, with its number
        self._extents: dict[str, Extent] = {}
        self._failures: dict[str, None] = {}
        self._offsets: list[str] = []
        self._parse(ttir)

    def narrow_offsets(self) -> list[str]:
        for offset in self._offsets:
            self._extent(offset)
        return list(self._failures)

    def _parse(self, ttir: str) -> None:
        regions: list[_Statement | None] = []
        for raw in ttir.splitlines():
            line = raw.strip()
            if line.startswith("tt.func"):
                level = INDEX if " public " in line else POSITION
                self._extents |= {name: Extent(level) for name in _NAME.findall(line)}
            line = re.sub(r" loc\(.*$", "", line)
            if line.startswith("}"):
                closed = regions.pop() if regions else None
                if line.endswith("{"):
                    regions.append(closed)
                continue
            statement = self._statement(line)
            if statement is not None and statement.op == "scf.yield" and regions and regions[-1] is not None:
                regions[-1].yields.append(statement.operands)
            if line.endswith("{"):
                regions.append(statement)

    def _statement(self, line: str) -> _Statement | None:
        found = _STATEMENT.match(line)
        if found is None:
            return None
        statement = _Statement(found["op"], found["rest"], _NAME.findall(found["rest"]), line)
        for name, number in _results(found["results"]):
            self._statements[name] = (statement, number)
        if statement.op == "tt.addptr":
            self._offsets.append(statement.operands[1])
        if statement.op == "scf.for":
            self._loop(statement)
        return statement

    def _loop(self, statement: _Statement) -> None:
        """Names the counter and the values that the loop carries, whose first values become the operands."""
        found = _FOR.search(statement.text)
        if found is None:
            raise ValueError(f"cannot read the loop {statement.line!r}")
        counter = _Statement("counter", "", [found["low"], found["high"], found["step"]], statement.line)
        self._statements[found["index"]] = (counter, 0)
        carried = _NAME.findall(found["args"] or "")
        statement.operands = carried[1::2]
        for number, name in enumerate(carried[::2]):
            self._statements[name] = (statement, number)

    def _extent(self, name: str) -> Extent:
        """Memoised; what is met again on the way to itself is carried by a loop."""
        if name not in self._extents:
            self._extents[name] = Extent(POSITION)
            if name in self._statements:
                self._extents[name] = self._of(*self._statements[name])
        return self._extents[name]

    def _of(self, statement: _Statement, number: int) -> Extent:
        if statement.op == "arith.constant":
            return Extent(BOUNDED, _constant(statement.text))
        if statement.op == "tt.make_range":
            return Extent(BOUNDED, int(re.search(r"end = (\d+)", statement.text)[1]))
        if statement.op in _INDEX_OPS:
            return Extent(INDEX)
        if statement.op in _OPAQUE:
            return Extent(POSITION)
        if statement.op == "scf.for":
            return self._carried(statement, number)
        if statement.op == "scf.if":
            branches = [self._extent(branch[number]) for branch in statement.yields if number < len(branch)]
            return functools.reduce(Extent.join, branches, Extent(BOUNDED))
        extents = [self._extent(operand) for operand in statement.operands]
        if statement.op == "counter":
            return _counter(*extents)
        if statement.op in ("arith.muli", "arith.shli"):
            return self._product(statement, *extents)
        if statement.op in _QUOTIENTS:
            return Extent(min(extents[0].level, INDEX), extents[0].bound)
        if statement.op in _REMAINDERS:
            return extents[1] if extents[1].level == BOUNDED else extents[0]
        if statement.op == "arith.addi":
            return Extent(max(one.level for one in extents), sum(one.bound for one in extents))
        return functools.reduce(Extent.join, extents) if extents else Extent(POSITION)

    def _carried(self, loop: _Statement, number: int) -> Extent:
        """What a loop changes on every trip has no bound that is seen here."""
        for names in (loop.operands, *loop.yields):
            self._extent(names[number])
        return Extent(POSITION)

    def _product(self, statement: _Statement, one: Extent, other: Extent) -> Extent:
        if statement.op == "arith.shli":
            other = Extent(other.level, 1 << min(other.bound, 63))
        low, high = sorted((one, other), key=lambda extent: extent.level)
        if re.search(r"i64>?$", statement.line):
            return Extent(BOUNDED if high.level == BOUNDED else POSITION, one.bound * other.bound)
        if high.level == BOUNDED and one.bound * other.bound < LIMIT:
            return Extent(BOUNDED, one.bound * other.bound)
        if low.level != BOUNDED:
            self._fail(statement, "a product of two runtime values")
        elif high.level == POSITION:
            self._fail(statement, "a number of elements, multiplied")
        elif low.bound > MAX_TILE or high.level == BOUNDED:
            self._fail(statement, f"multiplied by more than a tile's {MAX_TILE} rows")
        return Extent(POSITION)

    def _fail(self, statement: _Statement, why: str) -> None:
        self._failures[f"32-bit offset, {why}: {statement.line}"] = None


def _results(names: str | None) -> list[tuple[str, int]]:
    """`%a` or `%a:3`, which is later read as %a#0, %a#1, %a#2."""
    if names is None:
        return []
    name, _, count = names.strip().partition(":")
    return [(f"{name}#{i}", i) for i in range(int(count))] if count else [(name, 0)]


def _counter(low: Extent, high: Extent, step: Extent) -> Extent:
    if low.level == high.level == step.level == BOUNDED:
        return Extent(BOUNDED, high.bound)
    if step.level == BOUNDED and step.bound != 1:
        return Extent(POSITION)
    return Extent(max(low.level, INDEX))


def _constant(text: str) -> int:
    """Of an integer, also in every element; a table of several counts as the largest."""
    return max((abs(int(number)) for number in re.findall(r"-?\b\d+\b", text.partition(" : ")[0])), default=1)
