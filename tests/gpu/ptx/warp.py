"""What the lanes of a warp tell each other: shuffles, votes, elections and integer reductions."""

from __future__ import annotations

import functools

import numpy as np

from .control import Wait, missing_members
from .machine import Machine
from .opcodes import opcode, refuse
from .syntax import Instruction
from .values import WARP, Array, PtxTrap, decode, encode

LANE = np.arange(WARP)


def _rows(values: Array) -> Array:
    return np.ascontiguousarray(values).reshape(-1, WARP)


def _active_rows(m: Machine) -> Array:
    return _rows(m.alive if m.mask is None else m.mask)


@opcode("shfl.sync")
def shuffle(m: Machine, ins: Instruction) -> Wait | None:
    target, value, distance, clamp, members = ins.operands
    wait = missing_members(m, m.full_bits(members, 32), "shfl.sync")
    if wait:
        return wait
    values = _rows(m.full_bits(value, 32))
    undefined = m.taint
    offset = _rows(m.full_bits(distance, 32)).astype(np.int64) & 31
    control = _rows(m.full_bits(clamp, 32)).astype(np.int64)
    segment = (control >> 8) & 31
    low = LANE & segment
    bound = low | (control & 31 & ~segment)
    mode = next(p for p in ins.parts if p in ("up", "down", "bfly", "idx"))
    source = {
        "up": LANE - offset, "down": LANE + offset, "bfly": LANE ^ offset, "idx": low | (offset & ~segment),
    }[mode]  # fmt: skip
    inside = source >= bound if mode == "up" else source <= bound
    source = np.where(inside, source, LANE)
    active = _active_rows(m)
    if (active & ~np.take_along_axis(active, source, 1)).any():
        raise PtxTrap("shfl.sync reads from a lane that does not take part")
    if undefined is not None:
        m.taint = np.take_along_axis(_rows(undefined), source, 1).reshape(-1)
    targets = getattr(target, "items", (target,))
    m.write(targets[0], np.take_along_axis(values, source, 1).reshape(-1))
    if len(targets) > 1:
        m.put_predicate(targets[1], inside.reshape(-1))
    return None


@opcode("vote.sync")
def vote(m: Machine, ins: Instruction) -> Wait | None:
    wait = missing_members(m, m.full_bits(ins.operands[2], 32), "vote.sync")
    if wait:
        return wait
    active, votes = _active_rows(m), _rows(m.full(m.predicate(ins.operands[1])))
    if "ballot" in ins.modifiers:
        m.write(ins.operands[0], _ballot(votes & active))
        return None
    every, some = (votes | ~active).all(1), (votes & active).any(1)
    outcome = {"all": every, "any": some, "uni": every | ~some}[ins.parts[2]]
    m.put_predicate(ins.operands[0], np.repeat(outcome, WARP))
    return None


def _ballot(votes: Array) -> Array:
    """Votes [warps, 32] -> their mask, in every lane."""
    bits = (votes.astype(np.uint64) << LANE.astype(np.uint64)).sum(1)
    return np.repeat(bits.astype(np.uint32), WARP)


@opcode("activemask")
def active_mask(m: Machine, ins: Instruction) -> None:
    m.write(ins.operands[0], _ballot(_active_rows(m)))


@opcode("elect.sync")
def elect(m: Machine, ins: Instruction) -> Wait | None:
    wait = missing_members(m, m.full_bits(ins.operands[1], 32), "elect.sync")
    if wait:
        return wait
    leader = np.repeat(_active_rows(m).argmax(1), WARP)
    register, predicate = ins.operands[0].items
    m.write(register, leader.astype(np.uint32))
    m.put_predicate(predicate, m.special["laneid"] == leader)
    return None


@opcode("match")
def match_any(m: Machine, ins: Instruction) -> Wait | None:
    refuse(ins, "all")
    wait = missing_members(m, m.full_bits(ins.operands[2], 32), "match.any.sync")
    if wait:
        return wait
    values, active = _rows(m.full_bits(ins.operands[1], ins.type.width)), _active_rows(m)
    same = (values[:, :, None] == values[:, None, :]) & active[:, None, :]
    bits = (same.astype(np.uint64) << LANE.astype(np.uint64)).sum(2)
    m.write(ins.operands[0], bits.astype(np.uint32).reshape(-1))
    return None


REDUCTIONS = {
    "add": (np.add, 0), "and": (np.bitwise_and, -1), "or": (np.bitwise_or, 0), "xor": (np.bitwise_xor, 0),
    "min": (np.minimum, None), "max": (np.maximum, None),
}  # fmt: skip


@opcode("redux.sync")
def reduce(m: Machine, ins: Instruction) -> Wait | None:
    members = ins.operands[2]
    wait = missing_members(m, m.full_bits(members, 32), "redux.sync")
    if wait:
        return wait
    values, active = decode(_rows(m.full_bits(ins.operands[1], 32)), ins.type), _active_rows(m)
    function, neutral = REDUCTIONS[ins.parts[2]]
    if neutral is None:
        limits = np.iinfo(values.dtype)
        neutral = limits.max if ins.parts[2] == "min" else limits.min
    padded = np.where(active, values, np.array(neutral).astype(values.dtype))
    total = functools.reduce(function, padded.T)
    m.write(ins.operands[0], np.repeat(encode(total, ins.type), WARP))
    return None
