"""Finds row offsets that are computed in 32 bits, in the Triton IR of a kernel.

A tower of 2**22 rows and 512 columns has 2**31 elements: `row * stride` in 32 bits then addresses memory before the
tensor. No test on a small problem shows it, so the code is checked by a rule. Every integer that reaches an address is

    bounded   made of constants and tl.arange alone
    index     counts blocks or programs, times the constants it was multiplied by: a program id, a scalar argument, a
              quotient, the counter of a loop
    opaque    a loaded number, or one that a loop carries: nothing is known of its size

and a 32-bit product on the way to an address may only be bounded * bounded below 2**31, or bounded * index with a
factor of at most `MAX_TILE` in all: a block's first row (`pid * BLOCK_M`), a group's first block, a tile's own pitch
(`tl.arange(...) * stride`). Those stay below 2**31 for half a million blocks. Refused: a product of two runtime values,
a row times a constant pitch, and an opaque number times anything; they need `.to(tl.int64)` first. Sums are not checked
(a row number itself is taken to fit), nor are the bounds of loops.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field

MAX_TILE = 4096
LIMIT = 2**31
BOUNDED, INDEX, OPAQUE = range(3)

_NAME = re.compile(r"%[\w$.-]+(?:#\d+)?")
_STATEMENT = re.compile(r'^(?:(?P<results>%[^=]+?) = )?"?(?P<op>[a-z_]+\.[\w.]+)"?(?P<rest>.*)$')
_FOR = re.compile(
    r"(?P<index>%\S+) = (?P<low>%\S+) to (?P<high>%\S+) step (?P<step>%\S+)(?: iter_args\((?P<args>.*?)\))?"
)
_INDEX_OPS = ("tt.get_program_id", "tt.get_num_programs")
_QUOTIENTS = ("arith.divsi", "arith.divui", "arith.ceildivsi", "arith.floordivsi")
_REMAINDERS = ("arith.remsi", "arith.remui")
_OPAQUE_OPS = ("tt.load", "tt.call", "scf.while", "tt.atomic_rmw", "tt.atomic_cas", "tt.descriptor_load")


@dataclass(frozen=True)
class Extent:
    """How large a value can be: its level, and the largest value (bounded) or the factor in it (index)."""

    level: int
    size: int = 1

    def join(self, other: Extent) -> Extent:
        """Of either, or of their sum where one is an index: a tile's rows beside it do not change its factor."""
        if self.level != other.level:
            return max(self, other, key=lambda extent: extent.level)
        return Extent(self.level, max(self.size, other.size))


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
                level = INDEX if " public " in line else OPAQUE
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
            self._extents[name] = Extent(OPAQUE)
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
        if statement.op in _OPAQUE_OPS:
            return Extent(OPAQUE)
        if statement.op == "scf.for":
            return self._carried(statement, number)
        if statement.op == "scf.if":
            branches = [self._extent(branch[number]) for branch in statement.yields if number < len(branch)]
            return functools.reduce(Extent.join, branches, Extent(BOUNDED))
        if statement.op == "counter":
            return self._counter(*statement.operands)
        extents = [self._extent(operand) for operand in statement.operands]
        if statement.op in ("arith.muli", "arith.shli"):
            return self._product(statement, *extents)
        if statement.op in _QUOTIENTS:
            return Extent(min(extents[0].level, INDEX), extents[0].size if extents[0].level == BOUNDED else 1)
        if statement.op in _REMAINDERS:
            return extents[1] if extents[1].level == BOUNDED else extents[0]
        if statement.op == "arith.addi" and all(one.level == BOUNDED for one in extents):
            return Extent(BOUNDED, sum(one.size for one in extents))
        return functools.reduce(Extent.join, extents) if extents else Extent(OPAQUE)

    def _carried(self, loop: _Statement, number: int) -> Extent:
        """What a loop changes on every trip has no bound that is seen here."""
        for names in (loop.operands, *loop.yields):
            self._extent(names[number])
        return Extent(OPAQUE)

    def _counter(self, low: str, high: str, step: str) -> Extent:
        """Counts steps of a constant or of one; only constants are looked at, as a bound is no offset."""
        low_extent, constants = self._extent(low), [self._known_constant(name) for name in (high, step)]
        if low_extent.level == BOUNDED and None not in constants:
            return Extent(BOUNDED, constants[0])
        start = low_extent if low_extent.level != BOUNDED else Extent(INDEX)
        return Extent(start.level, max(start.size, constants[1] or 1))

    def _known_constant(self, name: str) -> int | None:
        statement, _ = self._statements.get(name, (None, 0))
        return _constant(statement.text) if statement is not None and statement.op == "arith.constant" else None

    def _product(self, statement: _Statement, one: Extent, other: Extent) -> Extent:
        if statement.op == "arith.shli":
            other = Extent(other.level, 1 << min(other.size, 63))
        low, high = sorted((one, other), key=lambda extent: extent.level)
        product = Extent(high.level, one.size * other.size)
        if re.search(r"i64>?$", statement.line):
            return product
        if low.level != BOUNDED:
            self._fail(statement, "a product of two runtime values")
        elif high.level == OPAQUE:
            self._fail(statement, "a loaded or carried number, multiplied")
        elif product.size >= (LIMIT if high.level == BOUNDED else MAX_TILE + 1):
            self._fail(statement, f"a count times more than {MAX_TILE} in all")
        return product

    def _fail(self, statement: _Statement, why: str) -> None:
        self._failures[f"32-bit offset, {why}: {statement.line}"] = None


def _results(names: str | None) -> list[tuple[str, int]]:
    """`%a` or `%a:3`, which is later read as %a#0, %a#1, %a#2."""
    if names is None:
        return []
    name, _, count = names.strip().partition(":")
    return [(f"{name}#{i}", i) for i in range(int(count))] if count else [(name, 0)]


def _constant(text: str) -> int:
    """Of an integer, also in every element; a table of several counts as the largest."""
    return max((abs(int(number)) for number in re.findall(r"-?\b\d+\b", text.partition(" : ")[0])), default=1)
