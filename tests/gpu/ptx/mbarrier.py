"""mbarrier: barriers in shared memory that count arrivals of threads and bytes of bulk copies.

A bulk copy lands when somebody waits for its barrier, not before: code that does not wait reads what a GPU may show it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .control import Wait
from .machine import Machine
from .memory import WRITTEN
from .opcodes import opcode, refuse
from .syntax import Address, Instruction
from .values import B64, PREDICATE, Array, PtxTrap


@dataclass
class Barrier:
    expected: int
    pending: int
    bytes_left: int = 0
    phase: int = 0
    copies: list[Callable[[], int]] = field(default_factory=list)
    """Copies under way; each lands when called and returns its size."""
    known: Array | None = None
    """For the race check: what whoever waits here learns."""

    def deliver(self) -> None:
        while self.copies:
            self.bytes_left -= self.copies.pop(0)()
        self.complete()

    def complete(self) -> None:
        if self.pending == 0 and self.bytes_left == 0 and not self.copies:
            self.phase, self.pending = self.phase + 1, self.expected


def barrier_at(m: Machine, address: int, block: int) -> Barrier:
    found = m.barriers.get((block, address))
    if found is None:
        raise PtxTrap(f"no mbarrier has been initialised at shared address {address}")
    return found


def learn(m: Machine, barrier: Barrier, block: int, agent: int) -> None:
    """What the agent knows now is passed on to whoever waits for the barrier."""
    if m.races:
        snapshot = m.races.release(block, agent)
        barrier.known = snapshot if barrier.known is None else np.maximum(barrier.known, snapshot)


def check_order(m: Machine, block: int, address: int, lane: int, *, exclusive: bool) -> None:
    """For the race check: initialising and invalidating a barrier must be ordered against every use of it."""
    if m.races:
        check = m.races.write if exclusive else m.races.read
        check(np.array([address + block * m.shared.stride]), 8, np.array([lane]))


def _active(m: Machine, operand: Address) -> list[tuple[int, int, int]]:
    """(lane, block, address) of the active lanes."""
    addresses = m.address(operand)
    return [(int(i), int(m.block_of[i]), int(addresses[i])) for i in m.active()]


@opcode("mbarrier.init")
def initialise(m: Machine, ins: Instruction) -> None:
    counts = m.full_bits(ins.operands[1], 32)
    for lane, block, address in _active(m, ins.operands[0]):
        m.shared.check_range(np.array([address]), 8)
        if address % 8:
            raise PtxTrap(f"misaligned mbarrier at shared address {address}")
        check_order(m, block, address, lane, exclusive=True)
        m.shared.store(np.array([address + block * m.shared.stride]), 64, np.zeros((1, 1), np.uint64), WRITTEN)
        m.barriers[block, address] = Barrier(int(counts[lane]), int(counts[lane]))


@opcode("mbarrier.inval")
def invalidate(m: Machine, ins: Instruction) -> None:
    for lane, block, address in _active(m, ins.operands[0]):
        if barrier_at(m, address, block).copies:
            raise PtxTrap(f"mbarrier at {address} is invalidated with a copy under way")
        check_order(m, block, address, lane, exclusive=True)
        del m.barriers[block, address]


@opcode("mbarrier.arrive", "mbarrier.expect_tx")
def arrive(m: Machine, ins: Instruction) -> None:
    refuse(ins, "noComplete", "arrive_drop")
    at = next(i for i, o in enumerate(ins.operands) if isinstance(o, Address))
    operand = m.full_bits(ins.operands[at + 1], 32) if len(ins.operands) > at + 1 else None
    expects = "expect_tx" in ins.modifiers
    tokens = np.zeros(m.lanes, np.uint64)
    for lane, block, address in _active(m, ins.operands[at]):
        barrier = barrier_at(m, address, block)
        check_order(m, block, address, lane, exclusive=False)
        tokens[lane] = barrier.phase
        if expects:
            barrier.bytes_left += int(operand[lane])
        if ins.parts[1] == "arrive":
            barrier.pending -= 1 if expects or operand is None else int(operand[lane])
            learn(m, barrier, block, int(m.warp_of[lane]))
        if barrier.pending < 0:
            raise PtxTrap(f"more arrivals at the mbarrier at {address} than it expects")
        barrier.complete()
    if at:
        m.put(ins.operands[0], tokens, B64)


@opcode("mbarrier.try_wait", "mbarrier.test_wait")
def wait(m: Machine, ins: Instruction) -> Wait | None:
    """try_wait holds a lane until its phase is complete; test_wait answers at once."""
    by_parity = "parity" in ins.modifiers
    wanted = m.full_bits(ins.operands[2], 32 if by_parity else 64)
    ready = np.zeros(m.lanes, bool)
    first_use: dict[tuple[int, int], Barrier] = {}
    for lane, block, address in _active(m, ins.operands[1]):
        barrier = first_use.get((block, address))
        if barrier is None:
            barrier = first_use[block, address] = barrier_at(m, address, block)
            if barrier.pending == 0:
                barrier.deliver()
        check_order(m, block, address, lane, exclusive=False)
        phase = int(wanted[lane])
        ready[lane] = (barrier.phase & 1) != (phase & 1) if by_parity else barrier.phase > phase
        if ready[lane] and m.races and barrier.known is not None:
            m.races.acquire(block, int(m.warp_of[lane]), barrier.known)
    if ins.parts[1] == "test_wait":
        m.put(ins.operands[0], ready, PREDICATE)
        return None
    running = m.alive if m.mask is None else m.mask
    late = running & ~ready
    if not late.any():
        m.put(ins.operands[0], ready, PREDICATE)
        return None
    m.mask = ready
    if ready.any():
        m.put(ins.operands[0], ready, PREDICATE)
    return Wait(late, True, f"an mbarrier whose phase is never complete ({_state(first_use)})", done=True)


def _state(barriers: dict[tuple[int, int], Barrier]) -> str:
    (_, address), barrier = next(iter(barriers.items()))
    return f"at {address}: {barrier.pending} arrivals and {barrier.bytes_left} bytes missing, phase {barrier.phase}"
