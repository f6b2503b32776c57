"""Run a compiled kernel on CPU tensors: `execute` and the scheduler below it.

Lanes of many threads, and blocks, run together. Where they diverge the lanes at the lowest program counter go first, so
that branches meet again where the compiler laid them out; lanes that wait are held until the others have moved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from . import arithmetic, conversions, data_movement, logic, mbarrier, tensor_core, tma, warp, wgmma
from .control import BlockBarriers, Wait
from .global_races import GlobalRaces, smallest_access
from .machine import Machine
from .memory import GlobalMemory
from .opcodes import find_handler, opcode
from .parse import parse
from .queues import GroupQueue
from .races import RaceDetector
from .syntax import Instruction, Kernel
from .values import WARP, Array, PtxTrap, UnknownInstruction

# Importing a module puts its opcodes into the table.
HANDLER_MODULES = (arithmetic, conversions, data_movement, logic, mbarrier, tensor_core, tma, warp, wgmma)

# What these compute from an undefined lane is undefined there, and a trap only where it is used: compilers turn masked
# loads and reductions into code that computes in all lanes and stores in some.
PASSES_ON = frozenset(
    {
        "add", "sub", "mul", "mad", "fma", "min", "max", "div", "rem", "neg", "abs", "and", "or", "xor", "not", "shl",
        "shr", "shf", "bfe", "bfi", "prmt", "lop3", "mov", "cvt", "selp", "setp", "shfl", *arithmetic.FUNCTIONS,
    }
)  # fmt: skip

HELD, ENDED = 1 << 40, 1 << 50


class Counts(Counter[str]):
    """Instructions issued, per opcode, summed over warps: what a profiler calls inst_executed."""


def execute(
    ptx: str,
    grid: Sequence[int],
    block: Sequence[int],
    args: Sequence[Any],
    *,
    shared_bytes: int = 0,
    tensors: Sequence[torch.Tensor] = (),
    entry: str | None = None,
    races: bool = False,
    scratch_bytes: int = 0,
    copies_need_fence: bool = True,
    recorder: Any = None,
    lanes: int = 4096,
    max_instructions: int = 1_000_000,
) -> Counts:
    """Run a kernel of a PTX module on CPU tensors, in place.

    ptx: what Triton (`compiled.asm["ptx"]`) or `nvcc -ptx` made. grid, block: up to three sizes, x first.
    args: one per parameter: a tensor (its address), int, float, bytes (a struct passed by value) or a
        `tma.TensorMap`. Triton's two trailing scratch pointers may be left out.
    shared_bytes: dynamic shared memory per block, `compiled.metadata.shared`.
    tensors: memory the kernel may touch besides the tensors among `args`.
    entry: the kernel's name or a part of its mangled name, where the module has several.
    races: also trap accesses to shared memory that no barrier orders, and to global memory what one block does to
        another's without atomics. Runs one block at a time.
    scratch_bytes: Triton's global scratch per program, `compiled.metadata.global_scratch_size`.
    copies_need_fence: whether data that cp.async has brought needs a fence.proxy.async before wgmma reads it, as the
        PTX memory model has it. Triton before 3.8 leaves the fence out.
    recorder: a `stats.Recorder` that sees every memory access.
    lanes: how many threads run together; max_instructions: a bound on each such batch, against endless loops.

    Raises: PtxTrap where the program is wrong, with the instruction; UnknownInstruction for what is not modelled.
    """
    kernel = parse(ptx, entry)
    for instruction in kernel.instructions:
        instruction.handler = instruction.handler or find_handler(instruction)
    grid, block = ((*sizes, 1, 1)[:3] for sizes in (tuple(grid), tuple(block)))
    total = int(np.prod(grid))
    args, scratch = _with_scratch(kernel, list(args), scratch_bytes, total)
    tensors = [*(a for a in args if isinstance(a, torch.Tensor)), *tensors, *scratch]
    memory, parameters, counts = GlobalMemory(tensors), pack_parameters(kernel, args), Counts()
    global_races = GlobalRaces(memory, smallest_access(kernel, "global")) if races else None
    step = 1 if races else max(1, lanes // int(np.prod(block)))
    with np.errstate(all="ignore"):
        for start in range(0, total, step):
            blocks = range(start, min(start + step, total))
            machine = Machine(kernel, grid, block, blocks, parameters, memory, shared_bytes)
            machine.copies, machine.bulk_stores, machine.products = (GroupQueue(machine.lanes) for _ in range(3))
            machine.block_barriers, machine.recorder = BlockBarriers(machine), recorder
            machine.races = RaceDetector(machine) if races else None
            machine.global_races, machine.copies_need_fence = global_races, copies_need_fence
            Scheduler(machine, max_instructions).run()
            counts.update(machine.counts)
    return counts


def _with_scratch(kernel: Kernel, args: list[Any], size: int, programs: int) -> tuple[list[Any], list[torch.Tensor]]:
    """Triton's kernels end in two pointers: global scratch, and the profiler's, which stays null."""
    if len(args) == len(kernel.parameters):
        return args, []
    if len(args) + 2 != len(kernel.parameters):
        raise ValueError(f"execute: {kernel.name} has {len(kernel.parameters)} parameters; got {len(args)} arguments")
    raw = torch.zeros(size * programs + 128, dtype=torch.uint8)
    aligned = raw[-raw.data_ptr() % 128 :][: size * programs]
    return [*args, aligned.data_ptr(), 0], [aligned]


def pack_parameters(kernel: Kernel, args: list[Any]) -> bytes:
    last = kernel.parameters[-1] if kernel.parameters else None
    packed = bytearray(last.offset + last.size if last else 0)
    for parameter, arg in zip(kernel.parameters, args, strict=True):
        value = _argument_bytes(arg, parameter.size)
        if len(value) != parameter.size:
            raise ValueError(f"execute: {parameter.name} has {parameter.size} bytes; got {len(value)}")
        packed[parameter.offset : parameter.offset + parameter.size] = value
    return bytes(packed)


def _argument_bytes(arg: Any, size: int) -> bytes:
    if isinstance(arg, torch.Tensor):
        arg = arg.data_ptr()
    if isinstance(arg, bytes | bytearray):
        return bytes(arg)
    if isinstance(arg, float):
        return np.array(arg, {2: np.float16, 4: np.float32, 8: np.float64}[size]).tobytes()
    if isinstance(arg, int | np.integer):
        return (int(arg) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    return arg.pack()


@opcode("bra", "ret", "exit")
def _control_flow(m: Machine, ins: Instruction) -> None:
    raise AssertionError("the scheduler carries these out itself")


@opcode("trap", "brkpt")
def _trap(m: Machine, ins: Instruction) -> None:
    raise PtxTrap("the kernel stopped itself: an assertion on the device failed")


class Scheduler:
    def __init__(self, machine: Machine, max_instructions: int) -> None:
        self.m, self.program, self.limit = machine, machine.kernel.instructions, max_instructions
        self.pc = 0
        self.counters: Array | None = None
        """Per lane, while lanes are apart; None while all living lanes are at `pc`."""
        self.everyone: Array | None = None if machine.alive.all() else machine.alive.copy()
        self.again = np.zeros(machine.lanes, bool)
        self.reason = ""
        self.executed, self.executed_at_retry = 0, -1

    def run(self) -> None:
        steps = 0
        while True:
            if self.counters is None:
                here, mask = self.pc, self.everyone
            else:
                here = int(self.counters.min())
                if here >= HELD:
                    if self._resume():
                        continue
                    break
                mask = self.counters == here
                if (mask == self.m.alive).all():
                    self.pc, self.counters, mask = here, None, self.everyone
            if here >= len(self.program):
                break
            steps += 1
            if steps > self.limit:
                raise PtxTrap(f"no end after {self.limit} instructions  [{self.program[here].text}]")
            self._step(here, mask)
        self._finish()

    def _finish(self) -> None:
        """Shared memory goes away with the block: nothing may still be using it."""
        if self.m.bulk_stores.entries:
            raise PtxTrap("the kernel ends while a bulk copy is still reading shared memory")
        if any(barrier.copies for barrier in self.m.barriers.values()):
            raise PtxTrap("the kernel ends while a bulk copy to shared memory is under way")

    def _step(self, here: int, mask: Array | None) -> None:
        m, ins = self.m, self.program[here]
        m.mask, m.passes_on, m.taint = mask, False, None
        if m.recorder:
            m.recorder.instruction = ins
        try:
            if ins.guard is not None:
                active = self._guarded(ins, mask)
                if active is False:
                    self._go(mask, here + 1)
                    return
                m.mask = active
            m.counts[ins.opcode] += self._warps(m.mask)
            if ins.opcode == "bra":
                self._branch(ins, mask, here)
            elif ins.opcode in ("ret", "exit"):
                self._exit(mask, here)
            else:
                self._handle(ins, mask, here)
        except PtxTrap as trap:
            raise PtxTrap(f"{trap}  [{ins.text[:160]}]") from None
        except UnknownInstruction as error:
            raise UnknownInstruction(f"{error}  [{ins.text[:160]}]") from None

    def _guarded(self, ins: Instruction, mask: Array | None) -> Array | bool | None:
        """The lanes whose guard holds; False where none does."""
        value = self.m.registers.get(ins.guard)
        if value is None or self.m.undefined:
            self.m.require_defined(ins.guard)
        value = ~value if ins.guard_negated else value
        if not value.ndim:
            return mask if value else False
        active = value if mask is None else value & mask
        if not active.any():
            return False
        return None if mask is None and active.all() else active

    def _warps(self, mask: Array | None) -> int:
        if mask is None:
            return self.m.lanes // WARP
        return int(mask.reshape(-1, WARP).any(1).sum())

    def _go(self, mask: Array | None, target: int) -> None:
        if self.counters is None:
            self.pc = target
        else:
            self.counters[mask] = target

    def _part(self, here: int) -> Array:
        """Give every lane a program counter of its own."""
        if self.counters is None:
            self.counters = np.where(self.m.alive, here, ENDED)
        return self.counters

    def _handle(self, ins: Instruction, mask: Array | None, here: int) -> None:
        self.m.passes_on = bool(self.m.undefined) and ins.opcode in PASSES_ON
        wait: Wait | None = ins.handler(self.m, ins)
        if wait is None:
            self.executed += 1
            self._go(mask, here + 1)
            return
        counters = self._part(here)
        counters[self.m.alive if mask is None else mask] = here + 1 if wait.done else here
        counters[wait.lanes] = HELD + (here if wait.again else here + 1)
        if wait.released is not None:
            counters[wait.released] -= HELD
        if wait.again:
            self.again |= wait.lanes
        self.reason = f"{wait.reason}  [{ins.text[:160]}]"
        moved = self.m.alive if self.m.mask is None else self.m.mask
        self.executed += bool(wait.done and (not wait.again or (moved & ~wait.lanes).any()))

    def _branch(self, ins: Instruction, mask: Array | None, here: int) -> None:
        self.executed += 1
        taken = self.m.mask
        if taken is mask or (taken is not None and mask is not None and (taken == mask).all()):
            self._go(mask, ins.target)
            return
        counters = self._part(here)
        counters[self.m.alive if mask is None else mask] = here + 1
        counters[taken] = ins.target

    def _exit(self, mask: Array | None, here: int) -> None:
        self.executed += 1
        ending, counters = self.m.mask, self._part(here)
        counters[self.m.alive if mask is None else mask] = here + 1
        counters[self.m.alive if ending is None else ending] = ENDED
        self.m.alive = counters < ENDED
        self.everyone = self.m.alive
        if not self.m.alive.any():
            self.counters, self.pc = None, len(self.program)

    def _resume(self) -> bool:
        """Let held lanes go on, where anything has changed for them. False when all lanes have ended."""
        if int(self.counters.min()) >= ENDED:
            return False
        released = self.m.block_barriers.after_exits()
        if released.any():
            self.counters[released] -= HELD
        elif self.again.any() and self.executed > self.executed_at_retry:
            self.executed_at_retry = self.executed
            self.counters[self.again] -= HELD
            self.again[:] = False
        else:
            raise PtxTrap(f"would hang: {int(self.m.alive.sum())} threads are left, waiting at {self.reason}")
        return True
