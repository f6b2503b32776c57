"""Hopper's warpgroup products: wgmma.mma_async on operands in shared memory.

A product runs at the wait that covers its group, on what shared memory holds then. In between its accumulators are no
registers: whoever reads one meets a trap.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import numpy as np

from .control import Wait
from .fragments import element_values, elements_per_word, left_matrix
from .machine import Machine
from .memory import ASYNC_READABLE_BIT
from .opcodes import opcode, refuse
from .syntax import Immediate, Instruction, Vector
from .tensor_core import accumulate, warp_words
from .values import Array, PtxTrap, UnknownInstruction

GROUP_LANES = 128
CHUNK = 16
# Layout field of a matrix descriptor -> bytes of a row of its swizzle pattern.
SPANS = {0: 16, 1: 128, 2: 64, 3: 32}


@dataclass(frozen=True)
class Layout:
    """The part of a matrix descriptor that does not move: strides in bytes and the swizzle's span."""

    leading: int
    stride: int
    span: int


@cache
def chunk_offsets(layout: Layout, rows: int, row_bytes: int, row_major_k: bool) -> Array:
    """Where the 16-byte chunks of a tile lie, before the swizzle: [rows, chunks along k], or [row chunks, k].

    The canonical layouts of the PTX ISA: atoms of 8 rows, `span` bytes wide, `stride` apart along the rows and
    `leading` along k; for a transposed operand the other way round, but without a swizzle the two change places.
    """
    span = layout.span
    if row_major_k:
        r, c = np.arange(rows)[:, None], CHUNK * np.arange(row_bytes // CHUNK)
        return r % 8 * span + c % span + r // 8 * layout.stride + c // span * layout.leading
    along, across = (layout.leading, layout.stride) if span > CHUNK else (layout.stride, layout.leading)
    element = 2
    c, k = CHUNK * np.arange(rows * element // CHUNK)[:, None], np.arange(row_bytes // element)
    return c % span + k % 8 * span + c // span * along + k // 8 * across


def tile_positions(m: Machine, descriptors: Array, groups: Array, offsets_of: tuple[int, int, bool]) -> Array:
    """Byte positions [groups, ...] of a tile's chunks; the descriptors may differ in their start only."""
    mine = descriptors[groups * GROUP_LANES]
    if len(np.unique(mine & ~np.uint64(0x3FFF))) > 1 or int(mine[0]) >> 49 & 7:
        raise UnknownInstruction("matrix descriptors that differ in more than their start, or have a base offset")
    fields = int(mine[0])
    layout = Layout((fields >> 16 & 0x3FFF) << 4, (fields >> 32 & 0x3FFF) << 4, SPANS[fields >> 62])
    offsets = chunk_offsets(layout, *offsets_of)
    start = ((mine & np.uint64(0x3FFF)) << np.uint64(4)).astype(np.int64)
    addresses = start.reshape(-1, *[1] * offsets.ndim) + offsets
    addresses ^= (addresses >> 7 & (layout.span // CHUNK - 1)) << 4
    m.shared.check_range(addresses, CHUNK)
    base = m.shared_base[groups * GROUP_LANES]
    return addresses + base.reshape(-1, *[1] * offsets.ndim)


class Tile:
    """An operand in shared memory."""

    def __init__(
        self, m: Machine, operand: object, groups: Array, rows: int, depth: int, element: str, transposed: bool
    ) -> None:
        self.m, self.rows, self.depth, self.element, self.transposed = m, rows, depth, element, transposed
        size = 4 // elements_per_word(element)
        if transposed and size != 2:
            raise UnknownInstruction(f"a transposed wgmma operand of type {element}")
        shape = (rows, depth * size, not transposed)
        self.positions = tile_positions(m, m.full_bits(operand, 64), groups, shape)
        self.agents = m.warp_of[groups * GROUP_LANES]

    def read(self, which: Array) -> Array:
        """float32 [groups, rows, depth] as shared memory holds it now."""
        positions = self.positions[which]
        if self.m.races:
            per_group = positions[0].size
            self.m.races.read_by(positions.reshape(-1), CHUNK, np.repeat(self.agents[which], per_group))
        chunks = self.m.shared.load(positions.reshape(-1), 64, 2, ASYNC_READABLE_BIT)
        values = element_values(chunks.view(np.uint32), self.element)
        if not self.transposed:
            return values.reshape(len(which), self.rows, self.depth)
        return values.reshape(len(which), -1, self.depth, 8).swapaxes(2, 3).reshape(len(which), self.rows, self.depth)


@opcode("wgmma.mma_async")
def multiply(m: Machine, ins: Instruction) -> Wait | None:
    refuse(ins, "sp")
    groups = active_groups(m)
    shape = re.fullmatch(r"m64n(\d+)k(\d+)", ins.parts[4])
    result, left, right = ins.parts[5:8]
    if not shape or result not in ("f32", "s32"):
        raise UnknownInstruction(f"wgmma is not modelled: {ins.text}")
    columns, depth = int(shape[1]), int(shape[2])
    target, a, b, keep, *flags = ins.operands
    values = [f.bits for f in flags]
    signs, transposes = (values[:2], values[2:]) if result == "f32" else ([], [])
    saturate = "satfinite" in ins.modifiers
    in_registers = isinstance(a, Vector)
    transpose_a, transpose_b = ([0, *transposes] if in_registers else transposes) or [0, 0]
    names = tuple(r.name for r in target.items)
    if in_registers:
        require_fence(m, [r.name for r in a.items])
        warps = (groups[:, None] * 4 + np.arange(4)).ravel()
        fragment = left_matrix(warp_words(m, a.items, warps), left).reshape(len(groups), 64, depth)
    else:
        left_tile = Tile(m, a, groups, 64, depth, left, bool(transpose_a))
        left_tile.read(np.arange(len(groups)))
    right_tile = Tile(m, b, groups, columns, depth, right, bool(transpose_b))
    right_tile.read(np.arange(len(groups)))
    kept = m.full(m.predicate(keep) if not isinstance(keep, Immediate) else np.array(bool(keep.bits))).copy()
    take_accumulators(m, names, kept)
    sign = -1.0 if signs.count(0xFFFFFFFF) + signs.count(-1) == 1 else 1.0

    def finish(positions: Array) -> None:
        which = np.unique(positions // GROUP_LANES)
        a_values = fragment[which] if in_registers else left_tile.read(which)
        product = a_values @ right_tile.read(which).swapaxes(1, 2)
        add_to_accumulators(m, names, groups[which], np.float32(sign) * product, kept, result, saturate)

    lanes = (groups[:, None] * GROUP_LANES + np.arange(GROUP_LANES)).ravel()
    m.products.add(lanes, finish)
    return None


def active_groups(m: Machine) -> Array:
    """Numbers of the warpgroups that run this instruction."""
    if m.lanes % GROUP_LANES or m.block_lanes % GROUP_LANES:
        raise PtxTrap("wgmma in a block that is no multiple of four warps")
    if m.mask is None:
        return np.arange(m.lanes // GROUP_LANES)
    by_group = m.mask.reshape(-1, GROUP_LANES)
    if (by_group.any(1) & ~by_group.all(1)).any():
        raise PtxTrap("wgmma reached by a part of a warpgroup")
    return np.flatnonzero(by_group.any(1))


def require_fence(m: Machine, names: list[str]) -> None:
    """Registers that wgmma reads must not change after wgmma.fence. Checked while all lanes are together."""
    if m.mask is not None:
        return
    for name in names:
        if m.registers.get(name) is not m.fenced.get(name):
            raise PtxTrap(f"register {name} was written after the last wgmma.fence")


def take_accumulators(m: Machine, names: tuple[str, ...], kept: Array) -> None:
    """Move the accumulators out of the registers until the product is waited for."""
    pending = m.pending.setdefault(names, np.zeros(m.lanes, np.int64))
    chained = pending > 0 if m.mask is None else (pending > 0) | ~m.mask
    if not chained.all():
        if kept[~chained].any():
            require_fence(m, list(names))
        for name in names:
            value = m.registers.get(name)
            if value is None or name in m.undefined:
                if kept[~chained].any():
                    m.require_defined(name)
                value = np.zeros((), np.uint32) if value is None else value
            held = m.accumulators.get(name)
            m.accumulators[name] = np.where(chained, held, value) if held is not None else m.full(value)
            m.discard(name, m.mask)
    pending[m.active()] += 1


def add_to_accumulators(
    m: Machine,
    names: tuple[str, ...],
    groups: Array,
    product: Array,
    kept: Array,
    result: str,
    saturate: bool,
) -> None:
    """accumulators = product (+ accumulators), and back to registers where no later product is under way."""
    columns = product.shape[2]
    # [group, warp, half, row, column block, lane in row, element] -> [block, half, element] x [group, warp, row, lane]
    by_register = product.reshape(len(groups), 4, 2, 8, columns // 8, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5)
    by_register = by_register.reshape(columns // 2, -1)
    lanes = (groups[:, None] * GROUP_LANES + np.arange(GROUP_LANES)).ravel()
    pending = m.pending[names]
    pending[lanes] -= 1
    settled = np.zeros(m.lanes, bool)
    settled[lanes] = pending[lanes] == 0
    everywhere, some = settled.all(), settled.any()
    outer, m.mask = m.mask, None if everywhere else settled
    for name, part in zip(names, by_register, strict=True):
        old = np.where(kept[lanes], m.accumulators[name][lanes], np.uint32(0))
        new = accumulate(part, old, result, saturate)
        total = new if lanes.size == m.lanes else m.accumulators[name].copy()
        if lanes.size != m.lanes:
            total[lanes] = new
        m.accumulators[name] = total
        if some:
            m.write_named(name, total)
            m.fenced[name] = m.registers[name]
    m.mask = outer


@opcode("wgmma.fence")
def fence(m: Machine, ins: Instruction) -> None:
    """Registers written before this may be read by the products after it."""
    active_groups(m)
    m.fenced.update(m.registers)


@opcode("wgmma.commit_group")
def commit(m: Machine, ins: Instruction) -> None:
    active_groups(m)
    m.products.commit(m.active())


@opcode("wgmma.wait_group")
def wait(m: Machine, ins: Instruction) -> None:
    active_groups(m)
    m.products.wait(m.mask, ins.operands[0].bits)
