"""Loads, stores, atomics and cp.async: everything that moves data between registers and memory lane by lane."""

from __future__ import annotations

import numpy as np

from .machine import Machine
from .memory import VISIBLE, WINDOW_BYTES, WINDOWS, WRITTEN
from .opcodes import opcode, refuse
from .syntax import Immediate, Instruction, Symbol, Vector
from .values import PREDICATE, UNSIGNED, Array, PtxTrap, Type, UnknownInstruction, decode, encode, pack, unpack

SPACES = ("global", "shared", "local", "param", "const")


def state_space(ins: Instruction) -> str:
    """The memory an access names; `generic` where it names none. cp.async and the like name several: the first."""
    if "shared::cluster" in ins.modifiers:
        return "shared"
    named = (p.split("::")[0] for p in ins.parts[1:])
    return next((p for p in named if p in SPACES), "generic")


def require_aligned(addresses: Array, size: int) -> None:
    bad = (addresses & np.uint64(size - 1)) != 0
    if bad.any():
        raise PtxTrap(f"misaligned access: {size} bytes at {int(addresses[bad][0]):#x}")


def by_space(space: str, addresses: Array) -> list[tuple[str, Array, Array]]:
    """(space, positions, addresses within the space): generic addresses are sorted by the window they lie in."""
    everything = np.arange(addresses.size)
    if space != "generic":
        return [(space, everything, addresses)]
    parts, left = [], np.ones(addresses.size, bool)
    for name, start in WINDOWS.items():
        inside = addresses - np.uint64(start) < np.uint64(WINDOW_BYTES)
        if inside.any():
            parts.append((name, np.flatnonzero(inside), addresses[inside] - np.uint64(start)))
            left &= ~inside
    if left.any():
        parts.append(("global", np.flatnonzero(left), addresses[left]))
    return parts


def load_lanes(m: Machine, space: str, addresses: Array, lanes: Array, width: int, count: int) -> Array:
    """[lanes, count] integers of `width` bits."""
    require_aligned(addresses, width // 8 * count)
    parts = by_space(space, addresses)
    if len(parts) == 1:
        return _load_space(m, parts[0][0], parts[0][2], lanes, width, count)
    out = np.empty((lanes.size, count), UNSIGNED[width])
    for name, where, inside in parts:
        out[where] = _load_space(m, name, inside, lanes[where], width, count)
    return out


def _load_space(m: Machine, space: str, addresses: Array, lanes: Array, width: int, count: int) -> Array:
    size = width // 8 * count
    if space == "global":
        if m.recorder:
            m.recorder.access("global", addresses, lanes, size)
        m.note_global(addresses, size, lanes, writes=False)
        return m.memory.load(addresses, width, count)
    if space == "shared":
        m.shared.check_range(addresses, size)
        positions = addresses.astype(np.int64) + m.shared_base[lanes]
        if m.races:
            m.races.read(positions, size, lanes)
        if m.recorder:
            m.recorder.access("shared", addresses, lanes, size)
        return m.shared.load(positions, width, count)
    if space == "local":
        return m.local.load(addresses, lanes, width, count)
    if space == "param":
        return _load_parameters(m, addresses, width, count)
    raise UnknownInstruction(f"loads from .{space} memory are not modelled")


def _load_parameters(m: Machine, addresses: Array, width: int, count: int) -> Array:
    size = width // 8
    raw = np.frombuffer(m.parameters, np.uint8)
    if int(addresses.max()) + size * count > raw.size:
        raise PtxTrap(f"parameter read out of range: byte {int(addresses.max())} of {raw.size}")
    index = addresses.astype(np.int64)[:, None] + np.arange(size * count)
    return np.ascontiguousarray(raw[index]).view(UNSIGNED[width])


def store_lanes(m: Machine, space: str, addresses: Array, lanes: Array, width: int, values: Array) -> None:
    require_aligned(addresses, width // 8 * values.shape[1])
    for name, where, inside in by_space(space, addresses):
        _store_space(m, name, inside, lanes[where], width, values[where])


def _store_space(m: Machine, space: str, addresses: Array, lanes: Array, width: int, values: Array) -> None:
    size = width // 8 * values.shape[1]
    if space == "global":
        if m.recorder:
            m.recorder.access("global", addresses, lanes, size)
        m.note_global(addresses, size, lanes, writes=True)
        m.memory.store(addresses, width, values)
    elif space == "shared":
        m.shared.check_range(addresses, size)
        positions = addresses.astype(np.int64) + m.shared_base[lanes]
        if m.races and not m.atomic:
            m.races.write(positions, size, lanes)
        if m.recorder:
            m.recorder.access("shared", addresses, lanes, size)
        m.shared.store(positions, width, values)
    elif space == "local":
        m.local.store(addresses, lanes, width, values)
    else:
        raise UnknownInstruction(f"stores to .{space} memory are not modelled")


def _registers(operand: object) -> tuple[object, ...]:
    return operand.items if isinstance(operand, Vector) else (operand,)


@opcode("ld", "ldu")
def load(m: Machine, ins: Instruction) -> None:
    kind, space = ins.type, state_space(ins)
    registers, source = _registers(ins.operands[0]), ins.operands[1]
    kind = Type("s", kind.width) if kind.kind == "s" else Type("u", kind.width)
    if space == "param" and isinstance(source.base, Symbol):
        parameter = next(p for p in m.kernel.parameters if p.name == source.base.name)
        start = np.array([parameter.offset + source.offset], np.uint64)
        found = _load_parameters(m, start, kind.width, len(registers))[0]
        for register, value in zip(registers, found, strict=True):
            m.put(register, decode(np.asarray(value), kind), kind)
        return
    lanes = m.active()
    found = load_lanes(m, space, m.address(source)[lanes], lanes, kind.width, len(registers))
    for i, register in enumerate(registers):
        m.put(register, decode(spread(m, found[:, i], lanes), kind), kind)


def spread(m: Machine, values: Array, lanes: Array) -> Array:
    """Values of the active lanes -> one per lane, anything elsewhere."""
    if lanes.size == m.lanes:
        return np.ascontiguousarray(values)
    out = np.zeros(m.lanes, values.dtype)
    out[lanes] = values
    return out


@opcode("st")
def store(m: Machine, ins: Instruction) -> None:
    width, lanes = ins.type.width, m.active()
    values = np.stack([m.full_bits(r, width)[lanes] for r in _registers(ins.operands[1])], 1)
    store_lanes(m, state_space(ins), m.address(ins.operands[0])[lanes], lanes, width, values)


ATOMIC = {
    "add": lambda old, x: old + x, "min": np.minimum, "max": np.maximum, "exch": lambda old, x: x,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "inc": lambda old, x: np.where(old >= x, 0, old + 1).astype(x.dtype),
    "dec": lambda old, x: np.where((old == 0) | (old > x), x, old - 1).astype(x.dtype),
}  # fmt: skip


@opcode("atom", "red")
def atomic(m: Machine, ins: Instruction) -> None:
    """Lanes that meet at one address take turns in lane order."""
    first = 1 if ins.opcode == "atom" else 0
    kind, space, lanes = ins.type, state_space(ins), m.active()
    name = next((p for p in ins.parts[1:] if p in ATOMIC or p == "cas"), None)
    if name is None or isinstance(ins.operands[0], Vector):
        raise UnknownInstruction(f"atomic is not modelled: {ins.text}")
    addresses = m.address(ins.operands[first])[lanes]
    operands = [m.full_bits(o, kind.bits)[lanes] for o in ins.operands[first + 1 :]]
    previous, waiting = np.zeros(lanes.size, UNSIGNED[kind.bits]), np.arange(lanes.size)
    recorder, m.recorder, m.atomic = m.recorder, None, True
    while waiting.size:
        _, turn = np.unique(addresses[waiting], return_index=True)
        now = waiting[np.sort(turn)]
        old = load_lanes(m, space, addresses[now], lanes[now], kind.bits, 1)[:, 0]
        new = _combine(name, old, [o[now] for o in operands], kind)
        store_lanes(m, space, addresses[now], lanes[now], kind.bits, new[:, None])
        previous[now] = old
        waiting = np.setdiff1d(waiting, now)
    m.recorder, m.atomic = recorder, False
    if recorder:
        for where, positions, inside in by_space(space, addresses):
            recorder.access(where, inside, lanes[positions], kind.bytes)
    if ins.opcode == "atom":
        m.write(ins.operands[0], spread(m, previous, lanes))


def _combine(name: str, old: Array, operands: list[Array], kind: Type) -> Array:
    if name == "cas":
        return np.where(old == operands[0], operands[1], old)
    if kind.lanes == 2:
        halves = zip(unpack(old, kind), unpack(operands[0], kind), strict=True)
        return pack([ATOMIC[name](a, b) for a, b in halves], kind)
    return encode(ATOMIC[name](decode(old, kind), decode(operands[0], kind)), kind)


@opcode("cp.async")
def copy_async(m: Machine, ins: Instruction) -> None:
    """Shared memory <- global memory, delivered at the wait; bytes past the source size become zeros."""
    refuse(ins, "mbarrier", "bulk", "reduce")
    operands = ins.operands[:-1] if "L2::cache_hint" in ins.modifiers else ins.operands
    size, lanes = operands[2].bits, m.active()
    target, source = (m.address(o)[lanes] for o in operands[:2])
    taken = np.full(lanes.size, size, np.int64)
    if len(operands) > 3:
        taken = _source_bytes(m, operands[3], size)[lanes]
    if (taken > size).any():
        raise PtxTrap(f"cp.async takes {int(taken.max())} bytes for a copy of {size}")
    require_aligned(target, size)
    require_aligned(source[taken > 0], size)
    m.shared.check_range(target, size)
    if (taken > 0).any():
        # One look at the bounds now, so that the trap names this instruction and not its wait.
        m.memory.locate(source[taken == size], size) if (taken == size).any() else None
        if m.recorder:
            m.recorder.access("global", source[taken > 0], lanes[taken > 0], size)
    m.note_global(source[taken == size], size, lanes[taken == size], writes=False)
    positions = target.astype(np.int64) + m.shared_base[lanes]
    if m.recorder:
        m.recorder.access("shared", target, lanes, size)
    if m.races:
        m.races.start_write(positions, size, lanes)
    m.shared.start_copy(positions, 32, size // 4)

    def deliver(which: Array) -> None:
        words = _fetch(m, source[which], taken[which], size)
        m.shared.finish_copy(positions[which], 32, words, WRITTEN if m.copies_need_fence else VISIBLE)
        if m.races:
            m.races.finish_write(positions[which], size, lanes[which])

    m.copies.add(lanes, deliver)


def _source_bytes(m: Machine, operand: object, size: int) -> Array:
    """A byte count, or a predicate that says to ignore the source."""
    name = getattr(operand, "name", "").lstrip("!")
    if not isinstance(operand, Immediate) and m.kernel.register_bits.get(name) == PREDICATE.width:
        return np.where(m.full(m.predicate(operand)), 0, size)
    return m.full_bits(operand, 32).astype(np.int64)


def _fetch(m: Machine, source: Array, taken: Array, size: int) -> Array:
    """[lanes, size / 4] words, zeros past `taken` bytes."""
    words = np.zeros((source.size, size // 4), np.uint32)
    whole = taken == size
    if whole.any():
        words[whole] = m.memory.load(source[whole], 32, size // 4)
    raw = words.view(np.uint8)
    for i in np.flatnonzero(~whole & (taken > 0)):
        count = int(taken[i])
        raw[i, :count] = m.memory.load(source[i : i + 1], 8, count)[0]
    return words


@opcode("cp.async.commit_group")
def commit_copies(m: Machine, ins: Instruction) -> None:
    m.copies.commit(m.active())


@opcode("cp.async.wait_group")
def wait_copies(m: Machine, ins: Instruction) -> None:
    m.copies.wait(m.mask, ins.operands[0].bits)


@opcode("cp.async.wait_all")
def wait_all_copies(m: Machine, ins: Instruction) -> None:
    m.copies.commit(m.active())
    m.copies.wait(m.mask, 0)


@opcode("isspacep")
def is_space(m: Machine, ins: Instruction) -> None:
    name, address = ins.parts[1].split("::")[0], m.bits(ins.operands[1], 64)
    inside = {n: address - np.uint64(start) < np.uint64(WINDOW_BYTES) for n, start in WINDOWS.items()}
    result = inside[name] if name in inside else ~np.logical_or.reduce(list(inside.values()))
    m.put_predicate(ins.operands[0], result)
