"""How good is a check? Break one line of a compiled kernel at a time and count how often the check notices.

    score = mutation_score(build.ptx, verdict, count=60)
    assert score.rate > 0.85, score.report()

`verdict(ptx)` runs the kernel and says whether its results are right. Changes that cannot be seen by any check, by the
rules of `equivalence`, do not count.
"""

from __future__ import annotations

import linecache
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from .equivalence import droppable_lines, equivalent_lines
from .parse import parse, split_operands
from .syntax import Instruction, Kernel
from .values import PtxTrap, UnknownInstruction

# What an opcode, up to its first type, turns into. Never into something that often does the same, such as or -> xor.
OPERATORS = {
    "add": "sub", "sub": "add", "and": "or", "or": "and", "xor": "and", "shl": "shr", "shr": "shl", "min": "max",
    "max": "min", "mul.f32": "add.f32", "div.full": "mul",
}  # fmt: skip
COMPARISONS = {
    "lt": ("le", "ge"), "le": ("lt", "gt"), "gt": ("ge", "le"), "ge": ("gt", "lt"), "eq": ("ne",), "ne": ("eq",),
    "ltu": ("geu",), "gtu": ("leu",), "leu": ("gtu",), "geu": ("ltu",), "equ": ("neu",), "neu": ("equ",),
}  # fmt: skip
ORDERED_SOURCES = {
    "sub": (1, 2), "shl": (1, 2), "shr": (1, 2), "selp": (1, 2), "div": (1, 2), "rem": (1, 2), "mad": (2, 3),
    "fma": (2, 3), "setp": (1, 2),
}  # fmt: skip
SYNCHRONISATION = ("bar", "barrier", "fence", "membar")
SYNCHRONISATION_PARTS = ("wait", "commit_group", "try_wait", "test_wait", "fence", "arrive", "expect_tx")  # prefixes
CONSTANT_OPCODES = frozenset(
    {
        "add", "sub", "mul", "mad", "and", "or", "xor", "shl", "shr", "bfe", "bfi", "prmt", "mov", "selp", "setp",
        "min", "max", "div", "rem", "fma", "ld", "st", "mbarrier", "tensormap",
    }
)  # fmt: skip
COUNTED_WAITS = ("cp.async.wait_group", "cp.async.bulk.wait_group", "wgmma.wait_group")
DROPPED_SYNC = "dropped synchronisation"
BLOCK_BARRIER = re.compile(r"\b(bar|barrier)(\.cta)?\.sync\b")
UNCHANGED = ("ret", "exit")
NOTHING: Mapping[str, str] = {}
INTEGER = re.compile(r"(?<![\w%.$+<@-])-?(?:0x[0-9a-fA-F]+|\d+)(?=U?(?![\w.]))")
FLOAT = re.compile(r"\b0[fF][0-9a-fA-F]{8}\b")


@dataclass(frozen=True)
class Mutant:
    line: int
    kind: str
    before: str
    after: str

    def apply(self, ptx: str) -> str:
        lines = ptx.split("\n")
        lines[self.line] = self.after
        return "\n".join(lines)

    def __str__(self) -> str:
        return f"line {self.line + 1}, {self.kind}: {self.before.strip()[:100]}  ->  {self.after.strip()[:100] or '-'}"


@dataclass
class Score:
    """killed counts by how the check noticed: wrong result, trap, refused."""

    killed: Counter[str] = field(default_factory=Counter)
    survived: list[Mutant] = field(default_factory=list)
    excluded: list[tuple[Mutant, str]] = field(default_factory=list)
    by_kind: dict[str, Counter[str]] = field(default_factory=dict)
    unneeded_barriers: list[Mutant] = field(default_factory=list)
    """Not counted: without them every access is still ordered, as far as the verdict's race check has run."""

    def __iadd__(self, other: Score) -> Score:
        self.killed += other.killed
        self.survived += other.survived
        self.excluded += other.excluded
        self.unneeded_barriers += other.unneeded_barriers
        for kind, counts in other.by_kind.items():
            self.by_kind.setdefault(kind, Counter()).update(counts)
        return self

    @property
    def total(self) -> int:
        return self.killed.total() + len(self.survived)

    @property
    def rate(self) -> float:
        return self.killed.total() / self.total if self.total else 0.0

    def report(self) -> str:
        head = f"{self.killed.total()} of {self.total} mutants noticed ({self.rate:.0%}): {dict(self.killed)}"
        kinds = [f"  {kind}: {dict(counts)}" for kind, counts in sorted(self.by_kind.items())]
        left = [f"  survived: {mutant}" for mutant in self.survived]
        apart = (
            f"  {len(self.excluded)} equivalent ones left out, {len(self.unneeded_barriers)} unneeded barriers found"
        )
        return "\n".join([head, apart, *kinds, *left])


def mutants(
    ptx: str, entry: str | None = None, unobservable: Mapping[str, str] = NOTHING
) -> tuple[list[Mutant], list[tuple[Mutant, str]]]:
    """All single-line changes of a kernel, and those of them that no check could notice, with the reason.

    unobservable: reasons that only the kernel's author knows, by a pattern of "statement -> changed statement // the
        line of source that it is compiled from".
    """
    kernel = parse(ptx, entry)
    lines, sources = ptx.split("\n"), _sources(ptx)
    equivalent, droppable = equivalent_lines(kernel), droppable_lines(kernel)
    counted, excluded = [], []
    for instruction in _alone_on_their_line(kernel):
        before = lines[instruction.line]
        for kind, after in _changes(instruction, before):
            mutant = Mutant(instruction.line, kind, before, after)
            reason = equivalent.get(mutant.line) or (kind.startswith("dropped") and droppable.get(mutant.line))
            change = " ".join(f"{before} -> {after} // {sources[mutant.line]}".split())
            reason = reason or next((why for what, why in unobservable.items() if re.search(what, change)), None)
            if reason:
                excluded.append((mutant, reason))
            elif after != before:
                counted.append(mutant)
    return counted, excluded


def _sources(ptx: str) -> list[str]:
    """The line of source that every line is compiled from, as the nearest .loc above it has it."""
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"(.*)"', ptx, re.MULTILINE))
    found, source = [], ""
    for line in ptx.split("\n"):
        if at := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line):
            source = linecache.getline(files.get(at[1], ""), int(at[2])).strip()
        found.append(source)
    return found


def _alone_on_their_line(kernel: Kernel) -> Iterator[Instruction]:
    per_line = Counter(i.line for i in kernel.instructions)
    for instruction in kernel.instructions:
        if per_line[instruction.line] == 1 and instruction.opcode not in UNCHANGED:
            yield instruction


def _changes(ins: Instruction, line: str) -> Iterator[tuple[str, str]]:
    """(kind, changed line). A statement that goes on over several lines is left alone."""
    name = ".".join(ins.parts)
    found = re.search(rf"(@!?[%\w]+\s+)?{re.escape(name)}(?![\w.])", line)
    end = line.find(";", found.end()) if found else -1
    if end < 0:
        return
    before, code, rest = line[: found.start()], line[found.start() : end], line[end:]
    synchronises = ins.opcode in SYNCHRONISATION or any(p.startswith(SYNCHRONISATION_PARTS) for p in ins.parts[1:])
    yield DROPPED_SYNC if synchronises else "dropped", (before + rest[1:]).rstrip()
    for kind, changed in [*_guards(code), *_operators(ins, code), *_constants(ins, code), *_swaps(ins, code)]:
        yield kind, before + changed + rest


def _guards(code: str) -> Iterator[tuple[str, str]]:
    found = re.search(r"@(!?)(?=[%\w])", code)
    if found:
        yield "guard", code[: found.start()] + ("@" if found[1] else "@!") + code[found.end() :]


def _operators(ins: Instruction, code: str) -> Iterator[tuple[str, str]]:
    name = ".".join(ins.parts)
    if ins.opcode == "setp":
        for other in COMPARISONS.get(ins.parts[1], ()):
            yield "operator", code.replace(f"setp.{ins.parts[1]}.", f"setp.{other}.", 1)
        return
    if ins.opcode in ("ldmatrix", "stmatrix"):
        without = name.replace(".trans", "")
        other = without if without != name else name.replace(".shared", ".trans.shared")
        yield "operator", code.replace(name, other, 1)
        return
    for old, new in OPERATORS.items():
        if name == old or name.startswith(old + "."):
            changed = name.replace(old, new, 1)
            if old in ("shl", "shr"):
                changed = f"{new}.b{ins.type.width}"
            yield "operator", code.replace(name, changed, 1)
            return


def _constants(ins: Instruction, code: str) -> Iterator[tuple[str, str]]:
    name = ".".join(ins.parts)
    if ins.opcode not in CONSTANT_OPCODES and not name.startswith(COUNTED_WAITS):
        return
    start, end = code.index(name) + len(name), len(code)
    if ins.opcode == "shfl":
        end = code.rindex(",", 0, code.rindex(","))  # the distance, not the clamp and the member mask
    for found in INTEGER.finditer(code, start, end):
        value = int(found[0], 0)
        if ins.opcode == "prmt" and code.count(",", 0, found.start()) < 3:
            # The bytes that one more or less would change need not be among those selected.
            yield "constant", code[: found.start()] + str(~value) + code[found.end() :]
            continue
        step = 1 if value >= 0 else -1
        yield "constant", code[: found.start()] + str(value + step) + code[found.end() :]
        if value and not name.startswith(COUNTED_WAITS):
            yield "constant", code[: found.start()] + str(value - step) + code[found.end() :]
    for found in FLOAT.finditer(code, start):
        bits = int(found[0][2:], 16)
        other = 0x3F800000 if bits == 0 else bits ^ 0x80000000
        yield "constant", f"{code[: found.start()]}0f{other:08X}{code[found.end() :]}"


def _swaps(ins: Instruction, code: str) -> Iterator[tuple[str, str]]:
    name = ".".join(ins.parts)
    start = code.index(name) + len(name)
    operands = split_operands(code[start:])
    packed = ins.opcode == "cvt" and len(operands) == 3
    commutes = ins.opcode == "setp" and ins.parts[1] in ("eq", "ne", "equ", "neu")
    if (ins.opcode not in ORDERED_SOURCES and not packed) or commutes:
        return
    first, second = (1, 2) if packed else ORDERED_SOURCES[ins.opcode]
    if "wide" in ins.parts or len(operands) <= second or operands[first] == operands[second]:
        return
    operands[first], operands[second] = operands[second], operands[first]
    yield "swapped operands", f"{code[:start]} {', '.join(operands)}"


def sample(
    ptx: str, count: int, seed: int = 0, entry: str | None = None, unobservable: Mapping[str, str] = NOTHING
) -> list[Mutant]:
    """A random choice, in turns from every kind of change, so that no common kind drowns the others."""
    generator = random.Random(seed)
    groups: dict[str, list[Mutant]] = {}
    for mutant in mutants(ptx, entry, unobservable)[0]:
        groups.setdefault(mutant.kind, []).append(mutant)
    for group in groups.values():
        generator.shuffle(group)
    chosen: list[Mutant] = []
    while len(chosen) < count and any(groups.values()):
        for kind in sorted(groups):
            if groups[kind] and len(chosen) < count:
                chosen.append(groups[kind].pop())
    return chosen


def mutation_score(
    ptx: str, verdict: Callable[[str], bool], *, count: int = 60, seed: int = 0, entry: str | None = None,
    race_checked: bool = False, unobservable: Mapping[str, str] = NOTHING,
) -> Score:  # fmt: skip
    """Run `verdict` on a seeded sample of mutants.

    verdict: runs a text and says whether the results are right; a PtxTrap or UnknownInstruction it lets through counts
        as noticed. It should bound `max_instructions`: some mutants never end.
    race_checked: the verdict runs with races=True. A block-wide barrier that can be dropped then orders nothing in
        these runs: a finding about the kernel, no fault that a check has missed.
    """
    if not verdict(ptx):
        raise ValueError("mutation_score: verdict rejects the kernel as it is")
    score = Score(excluded=mutants(ptx, entry, unobservable)[1])
    for mutant in sample(ptx, count, seed, entry, unobservable):
        outcome = _outcome(mutant.apply(ptx), verdict)
        if race_checked and not outcome and mutant.kind == DROPPED_SYNC and BLOCK_BARRIER.search(mutant.before):
            score.unneeded_barriers.append(mutant)
            continue
        counts = score.by_kind.setdefault(mutant.kind, Counter())
        counts["killed" if outcome else "survived"] += 1
        if outcome:
            score.killed[outcome] += 1
        else:
            score.survived.append(mutant)
    return score


def _outcome(ptx: str, verdict: Callable[[str], bool]) -> str | None:
    try:
        return None if verdict(ptx) else "wrong result"
    except PtxTrap:
        return "trap"
    except UnknownInstruction:
        return "refused"
