"""Barriers of a block, fences, and what has no effect on results.

An instruction that cannot go on in some lanes returns a `Wait`: the scheduler holds those lanes and runs others.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .machine import Machine
from .opcodes import opcode
from .syntax import Instruction
from .values import WARP, Array, UnknownInstruction


@dataclass
class Wait:
    """Lanes to hold. `again` says to run the instruction once more later; otherwise they go on after a release."""

    lanes: Array
    again: bool
    reason: str
    released: Array | None = None
    """Lanes held earlier that may go on now."""
    done: bool = False
    """Whether the instruction has been carried out in the lanes that are not held."""


@dataclass
class BlockBarrier:
    lanes: list[Array] = field(default_factory=list)
    """Lanes that have arrived, and, of those, the ones that wait."""
    waiting: list[Array] = field(default_factory=list)
    expected: int | None = None


class BlockBarriers:
    """The numbered barriers of every block. Without a thread count, one waits for all threads still alive."""

    def __init__(self, m: Machine) -> None:
        self.m = m
        self.open: dict[tuple[int, int], BlockBarrier] = {}

    def arrive(self, number: int, expected: int | None, waits: bool) -> Wait | None:
        m, lanes = self.m, self.m.active()
        if m.mask is None and waits and not self.open and expected in (None, m.threads):
            self._synchronise(lanes)
            return None
        released = np.zeros(m.lanes, bool)
        for block in np.unique(m.block_of[lanes]):
            barrier = self.open.setdefault((int(block), number), BlockBarrier(expected=expected))
            mine = lanes[m.block_of[lanes] == block]
            barrier.lanes.append(mine)
            if waits:
                barrier.waiting.append(mine)
        self._release(released)
        held = np.zeros(m.lanes, bool)
        if waits:
            held[lanes] = ~released[lanes]
        released[lanes] = False
        return Wait(held, False, f"barrier {number}, which not all threads of the block reach", released, done=True)

    def _release(self, released: Array) -> None:
        for key, barrier in list(self.open.items()):
            arrived = sum(part.size for part in barrier.lanes)
            expected = barrier.expected
            if expected is None:
                expected = int(self.m.alive[self.m.block_of == key[0]].sum())
            if arrived >= expected:
                self._synchronise(np.concatenate(barrier.lanes))
                if barrier.waiting:
                    released[np.concatenate(barrier.waiting)] = True
                del self.open[key]

    def after_exits(self) -> Array:
        """Lanes whose barrier is complete because threads have exited."""
        released = np.zeros(self.m.lanes, bool)
        self._release(released)
        return released

    def _synchronise(self, lanes: Array) -> None:
        if self.m.races:
            self.m.races.synchronise(lanes)


@opcode("bar.sync", "barrier.sync", "bar.cta.sync", "barrier.cta.sync", "bar.arrive", "barrier.arrive")
def barrier(m: Machine, ins: Instruction) -> Wait | None:
    lane = int(m.active()[0])
    number = m.scalar(ins.operands[0], lane, 32)
    expected = m.scalar(ins.operands[1], lane, 32) if len(ins.operands) > 1 else None
    return m.block_barriers.arrive(number, expected, waits="arrive" not in ins.modifiers)


@opcode("bar.red", "barrier.red", "barrier.cta.red", "bar.cta.red")
def barrier_reduce(m: Machine, ins: Instruction) -> None:
    """__syncthreads_count / _and / _or, where the whole block arrives together."""
    arrived = np.zeros(m.lanes, bool)
    arrived[m.active()] = True
    if (arrived != (m.alive & np.isin(m.block_of, m.active_blocks()))).any() or len(ins.operands) != 3:
        raise UnknownInstruction(f"a reducing barrier reached in parts is not modelled: {ins.text}")
    m.block_barriers.arrive(m.scalar(ins.operands[1], int(m.active()[0]), 32), None, waits=True)
    votes = (m.full(m.predicate(ins.operands[2])) & arrived).reshape(m.block_count, -1)
    if "popc" in ins.modifiers:
        m.write(ins.operands[0], votes.sum(1).astype(np.uint32)[m.block_of])
    else:
        required = arrived.reshape(m.block_count, -1)
        outcome = (votes | ~required).all(1) if "and" in ins.modifiers else votes.any(1)
        m.put_predicate(ins.operands[0], outcome[m.block_of])


@opcode("bar.warp.sync")
def warp_barrier(m: Machine, ins: Instruction) -> Wait | None:
    wait = missing_members(m, m.full_bits(ins.operands[0], 32), "bar.warp.sync")
    if m.races and wait is None:
        m.races.within.barrier(m.active())
    return wait


def missing_members(m: Machine, members: Array, what: str) -> Wait | None:
    """A Wait for the lanes of warps where a lane named in the member mask has not arrived; None where all have."""
    active = m.alive if m.mask is None else m.mask
    if m.mask is None and (members[m.alive] == 0xFFFFFFFF).all():
        return None
    by_warp, alive = active.reshape(-1, WARP), m.alive.reshape(-1, WARP)
    named = (members.reshape(-1, WARP)[..., None] >> np.arange(WARP, dtype=np.uint32)) & np.uint32(1) == 1
    needed = (named & by_warp[..., None]).any(1)
    late = (needed & alive & ~by_warp).any(1)
    if not late.any():
        return None
    return Wait((by_warp & late[:, None]).reshape(-1), True, f"{what} that not all lanes of its mask reach")


def whole_warp(m: Machine, what: str) -> Wait | None:
    """A Wait for warps of which only a part has arrived."""
    if m.mask is None:
        return None
    by_warp = m.mask.reshape(-1, WARP)
    late = by_warp.any(1) & ~by_warp.all(1)
    if not late.any():
        return None
    return Wait((by_warp & late[:, None]).reshape(-1), True, f"{what} that only a part of a warp reaches")


@opcode("fence", "membar")
def fence(m: Machine, ins: Instruction) -> None:
    if ins.parts[1:3] == ("proxy", "async"):
        for block in m.active_blocks():
            m.shared.fence_async(int(block))


@opcode(
    "prefetch", "prefetchu", "discard", "applypriority", "nanosleep", "griddepcontrol", "setmaxnreg", "pmevent",
    "cp.async.bulk.prefetch",
)  # fmt: skip
def no_effect(m: Machine, ins: Instruction) -> None:
    """Hints: they change when things happen, not what happens."""


@opcode("createpolicy")
def create_policy(m: Machine, ins: Instruction) -> None:
    """A cache-eviction policy is a hint too; its register only has to be defined."""
    m.write(ins.operands[0], np.array(0, np.uint64))
