"""Which changes of a kernel cannot change what it does: rules that hold for every input.

- a result that no later instruction needs, followed through all branches and through results not needed either;
- leaving out a constant that the register holds already;
- a barrier or wait next to an equal one, with nothing but register arithmetic between them;
- a wait or a commit that nothing to wait for can reach;
- hints: prefetches, cache policies, sleeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from .syntax import Address, Immediate, Instruction, Kernel, Register, TensorAddress, Vector

# Instructions that do something besides writing their first operand. All others count as pure.
EFFECTS = frozenset(
    [
        "st",
        "red",
        "atom",
        "bar",
        "barrier",
        "cp",
        "mbarrier",
        "fence",
        "membar",
        "wgmma",
        "tensormap",
        "stmatrix",
        "bra",
        "ret",
        "exit",
        "trap",
        "brkpt",
    ]
)
HINTS = frozenset(
    ["prefetch", "prefetchu", "discard", "applypriority", "nanosleep", "griddepcontrol", "setmaxnreg", "pmevent"]
)
TOUCHES_MEMORY = EFFECTS | {"ld", "ldu", "ldmatrix"}
ENDS = ("ret", "exit")
WAITS = ("cp.async.wait", "cp.async.bulk.wait", "wgmma.wait")


def registers(operands: Iterable[Any]) -> set[str]:
    """Names of all registers among operands, in addresses and vectors too."""
    found: set[str] = set()
    for operand in operands:
        if isinstance(operand, Register):
            found.add(operand.name.lstrip("!"))
        elif isinstance(operand, Vector):
            found |= registers(operand.items)
        elif isinstance(operand, Address):
            found |= registers([operand.base])
        elif isinstance(operand, TensorAddress):
            found |= registers([operand.descriptor, *operand.coordinates])
    return found


def is_pure(ins: Instruction) -> bool:
    return ins.opcode not in EFFECTS and ins.opcode not in HINTS


def written(ins: Instruction) -> set[str]:
    """Registers this instruction certainly or possibly writes, as far as they matter for liveness."""
    if is_pure(ins):
        return registers(ins.operands[:1])
    first = ins.operands[0] if ins.operands else None
    return (
        {first.name} if isinstance(first, Register) and ins.opcode in ("atom", "mbarrier", "bar", "barrier") else set()
    )


def read(ins: Instruction) -> set[str]:
    sources = ins.operands[1:] if is_pure(ins) or written(ins) else ins.operands
    return registers(sources) | ({ins.guard} if ins.guard else set())


def successors(kernel: Kernel, index: int) -> list[int]:
    ins, following = kernel.instructions[index], [index + 1]
    if ins.opcode == "bra":
        following = [ins.target, index + 1] if ins.guard else [ins.target]
    elif ins.opcode in ENDS and not ins.guard:
        following = []
    return [i for i in following if i < len(kernel.instructions)]


def unneeded(kernel: Kernel) -> set[int]:
    """Pure instructions whose result cannot reach anything with an effect."""
    number = {name: i for i, name in enumerate(kernel.register_bits)}

    def mask(names: set[str]) -> int:
        return sum(1 << number[n] for n in names if n in number)

    program = kernel.instructions
    reads, writes = [mask(read(i)) for i in program], [mask(written(i)) for i in program]
    follows = [successors(kernel, i) for i in range(len(program))]
    needed = [0] * len(program)
    changed = True
    while changed:
        changed = False
        for i in reversed(range(len(program))):
            after = 0
            for j in follows[i]:
                after |= needed[j]
            before = after
            if not is_pure(program[i]) or after & writes[i]:
                before = (after if program[i].guard else after & ~writes[i]) | reads[i]
            if before != needed[i]:
                needed[i], changed = before, True
    result = set()
    for i, ins in enumerate(program):
        after = 0
        for j in follows[i]:
            after |= needed[j]
        if is_pure(ins) and not after & writes[i]:
            result.add(i)
    return result


def repeated_constants(kernel: Kernel) -> set[int]:
    """`mov` of a constant, or of a register that holds one, to a register that holds it already on every path."""
    program = kernel.instructions
    leaders = {0} | {j for i, ins in enumerate(program) if ins.opcode in ("bra", *ENDS) for j in (i + 1, ins.target)}
    entries: dict[int, dict[str, int] | None] = {i: None for i in sorted(leaders) if 0 <= i < len(program)}
    entries[0] = {}
    work, repeated = [0], set()
    while work:
        i = work.pop()
        known = dict(entries[i])
        while True:
            _track_constant(program[i], known)
            if i + 1 in entries or program[i].opcode in ("bra", *ENDS):
                break
            i += 1
        for j in successors(kernel, i):
            met = known if entries[j] is None else {n: v for n, v in entries[j].items() if known.get(n) == v}
            if met != entries[j]:
                entries[j] = dict(met)
                work.append(j)
    for start, known in entries.items():
        i, known = start, dict(known or {})
        while i < len(program) and (i == start or i not in entries):
            if _track_constant(program[i], known) and entries[start] is not None:
                repeated.add(i)
            i += 1
    return repeated


def _track_constant(ins: Instruction, known: dict[str, int]) -> bool:
    """Follow one instruction. True where it writes what its register is known to hold."""
    if ins.opcode == "mov" and not ins.guard and isinstance(ins.operands[0], Register):
        name, source = ins.operands[0].name, ins.operands[1]
        value = source.bits if isinstance(source, Immediate) else known.get(getattr(source, "name", ""))
        if value is not None:
            same = known.get(name) == value
            known[name] = value
            return same
    for name in written(ins) | (registers(ins.operands[:1]) if ins.opcode == "wgmma" else set()):
        known.pop(name, None)
    return False


def redundant_barriers(kernel: Kernel) -> set[int]:
    """Whole-block barriers, and waits for groups, that an equal one precedes or follows in the same straight line."""
    program = kernel.instructions
    targets = {i.target for i in program if i.opcode == "bra"}

    def is_barrier(i: int) -> bool:
        waits = ".".join(program[i].parts).startswith(WAITS)
        return (waits or program[i].opcode in ("bar", "barrier")) and not program[i].guard

    def meets(start: int, step: int) -> bool:
        i = start
        while True:
            if step < 0 and i in targets:
                return False
            i += step
            if not 0 <= i < len(program):
                return False
            if is_barrier(i) and program[i].text == program[start].text:
                return True
            if program[i].opcode in TOUCHES_MEMORY:
                return False

    return {i for i in range(len(program)) if is_barrier(i) and (meets(i, -1) or meets(i, 1))}


def idle_waits(kernel: Kernel) -> set[int]:
    """Waits for, and commits of, asynchronous work that no such work can reach."""
    program = kernel.instructions
    found = set()
    for kind, starts, waits in ASYNCHRONOUS:
        reached = _reachable_from(kernel, [i for i, ins in enumerate(program) if starts(ins)])
        idle = {i for i, ins in enumerate(program) if ins.text.partition(" ")[2] and waits(ins)} - reached
        found |= {i for i in idle if program[i].opcode == kind}
    return found


def _starts(prefix: str, part: str) -> Callable[[Instruction], bool]:
    return lambda ins: ".".join(ins.parts).startswith(prefix) and part in ".".join(ins.parts)


def _waits(*names: str) -> Callable[[Instruction], bool]:
    return lambda ins: ".".join(ins.parts).startswith(names)


ASYNCHRONOUS = (
    ("cp", _starts("cp.async.c", "shared"), _waits("cp.async.wait", "cp.async.commit")),
    ("cp", _starts("cp.async.bulk", "bulk_group"), _waits("cp.async.bulk.wait", "cp.async.bulk.commit")),
    ("wgmma", _starts("wgmma.mma_async", ""), _waits("wgmma.wait", "wgmma.commit")),
)


def _reachable_from(kernel: Kernel, starts: list[int]) -> set[int]:
    seen, left = set(), list(starts)
    while left:
        for j in successors(kernel, left.pop()):
            if j not in seen:
                seen.add(j)
                left.append(j)
    return seen


def equivalent_lines(kernel: Kernel) -> dict[int, str]:
    """Line of the module's text -> why no change of the instruction there can be seen."""
    program = kernel.instructions
    reasons: dict[int, str] = {i: "hint" for i, ins in enumerate(program) if ins.opcode in HINTS}
    reasons |= dict.fromkeys(unneeded(kernel), "its result is not needed")
    reasons |= dict.fromkeys(idle_waits(kernel), "there is nothing to wait for")
    return {program[i].line: reason for i, reason in reasons.items()}


def droppable_lines(kernel: Kernel) -> dict[int, str]:
    """Line -> why the instruction there may be left out, though a change of it might be seen."""
    program = kernel.instructions
    reasons = dict.fromkeys(repeated_constants(kernel), "the register holds this constant already")
    reasons |= dict.fromkeys(redundant_barriers(kernel), "its equal is next to it")
    return {program[i].line: reason for i, reason in reasons.items()}
