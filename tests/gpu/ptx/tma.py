"""Tensor maps and the bulk copies that use them (the tensor memory accelerator).

A tensor map is 128 opaque bytes on a GPU; here they have the layout of `FIELDS`, wherever they lie: in a parameter, or
in shared and global memory, where tensormap.replace builds them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .control import Wait, whole_warp
from .data_movement import by_space, load_lanes, state_space, store_lanes
from .machine import Machine
from .mbarrier import barrier_at, learn
from .memory import ASYNC_READABLE_BIT, VISIBLE
from .opcodes import opcode
from .syntax import Address, Immediate, Instruction, TensorAddress
from .values import Array, PtxTrap, UnknownInstruction, parse_type

from .values import Type, decode, encode  # isort: skip

MAP_BYTES = 128
FIELDS = np.dtype(
    {
        "names": [
            "global_address", "global_stride", "global_dim", "box_dim", "element_stride", "rank", "elemtype",
            "interleave_layout", "swizzle_mode", "fill_mode", "given",
        ],
        "formats": ["<u8", ("<u8", 4), ("<u4", 5), ("<u4", 5), ("<u4", 5), "u1", "u1", "u1", "u1", "u1", "<u2"],
        "offsets": [0, 8, 40, 60, 80, 100, 101, 102, 103, 104, 106],
        "itemsize": MAP_BYTES,
    }
)  # fmt: skip
# What a map of zeros may leave as it is.
OPTIONAL = ("interleave_layout", "global_stride", "fill_mode", "elemtype", "swizzle_mode")
# tensormap.replace .elemtype -> how the elements are stored.
ELEMENTS = {
    0: "u8", 1: "u16", 2: "u32", 3: "s32", 4: "u64", 5: "s64", 6: "f16", 7: "f32", 8: "f32", 9: "f64", 10: "bf16",
    11: "f32", 12: "f32",
}  # fmt: skip
SWIZZLE_BYTES = {0: 0, 1: 32, 2: 64, 3: 128}


@dataclass(frozen=True)
class TensorMap:
    """A tensor map made on the host. Sizes and strides innermost first; strides in bytes, without the innermost."""

    address: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    element: int
    swizzle: int
    nan_fill: bool = False

    def pack(self) -> bytes:
        raw = np.zeros((), FIELDS)
        raw["global_address"], raw["rank"], raw["elemtype"] = self.address, len(self.sizes) - 1, self.element
        raw["swizzle_mode"], raw["fill_mode"] = self.swizzle, int(self.nan_fill)
        for name, values in (("global_dim", self.sizes), ("global_stride", self.strides), ("box_dim", self.box)):
            raw[name][: len(values)] = values
        raw["element_stride"][: len(self.sizes)] = 1
        raw["given"] = (1 << len(FIELDS.names)) - 1
        return raw.tobytes()


def descriptor_arguments(descriptor: Any, metadata: dict[str, Any]) -> list[Any]:
    """What Triton passes for a TensorDescriptor: the map, its sizes and its strides, outermost first.

    metadata: this argument's entry of `compiled.metadata.tensordesc_meta`.
    """
    if metadata["fp4_padded"] or metadata.get("is_im2col"):
        raise UnknownInstruction(f"tensor descriptors of this kind are not modelled: {metadata}")
    shape, strides, size = list(descriptor.shape), list(descriptor.strides), metadata["elem_size"]
    tensor_map = TensorMap(
        descriptor.base.data_ptr(), tuple(shape[::-1]), tuple(s * size for s in strides[-2::-1]),
        tuple(metadata["block_size"][::-1]), metadata["elem_type"], metadata["swizzle"], descriptor.padding == "nan",
    )  # fmt: skip
    return [tensor_map, *shape, *strides]


@opcode("tensormap.replace")
def replace_field(m: Machine, ins: Instruction) -> None:
    """tensormap.replace.tile.<field>.<space>.b1024.<type> [map], {index,} value."""
    field, *rest = ins.parts[3], *ins.operands
    address, index, value = rest[0], rest[1] if len(rest) > 2 else Immediate(0), rest[-1]
    width = parse_type(ins.parts[-1]).width
    space, addresses = state_space(ins), m.address(address)
    if field not in FIELDS.names:
        raise UnknownInstruction(f"tensor map field is not modelled: {ins.text}")
    for lane in m.active():
        one = np.array([lane])
        raw = load_lanes(m, space, addresses[one], one, 8, MAP_BYTES)
        fields = raw.view(FIELDS)[0, 0:1]
        if fields[field].ndim > 1:
            fields[field][0, index.bits] = m.scalar(value, lane, width)
        else:
            fields[field][0] = m.scalar(value, lane, width)
        fields["given"] |= 1 << FIELDS.names.index(field)
        store_lanes(m, space, addresses[one], one, 8, raw)


@opcode("tensormap.cp_fenceproxy")
def publish_map(m: Machine, ins: Instruction) -> Wait | None:
    """A warp copies a map from shared to global memory and makes it visible to bulk copies."""
    wait = whole_warp(m, "tensormap.cp_fenceproxy")
    if wait:
        return wait
    if ins.operands[2].bits != MAP_BYTES:
        raise PtxTrap(f"a tensor map has {MAP_BYTES} bytes, not {ins.operands[2].bits}")
    leaders = m.whole_warps("tensormap.cp_fenceproxy")
    raw = load_lanes(m, "shared", m.address(ins.operands[1])[leaders], leaders, 8, MAP_BYTES)
    addresses = m.address(ins.operands[0])[leaders]
    store_lanes(m, "global", addresses, leaders, 8, raw)
    m.published_maps.update(map(int, addresses))
    return None


@opcode("fence.proxy.tensormap::generic.acquire", "fence.proxy.tensormap::generic")
def acquire_map(m: Machine, ins: Instruction) -> None:
    """Without this a bulk copy may use what was at the map's address before."""
    if "acquire" in ins.modifiers:
        m.published_maps.difference_update(map(int, m.address(ins.operands[0])[m.active()]))


@dataclass
class Box:
    """The elements one bulk copy moves: shared byte positions, global addresses, and which lie inside the tensor."""

    positions: Array
    addresses: Array
    inside: Array
    width: int
    element: Type
    nan_fill: bool

    @property
    def bytes(self) -> int:
        return self.positions.size * self.width // 8


def read_map(m: Machine, operand: TensorAddress, lane: int) -> np.void:
    address = m.full_bits(operand.descriptor, 64)[lane : lane + 1]
    if int(address[0]) % 64:
        raise PtxTrap(f"misaligned tensor map at {int(address[0]):#x}")
    if int(address[0]) in m.published_maps:
        raise PtxTrap("a bulk copy uses a tensor map before fence.proxy.tensormap has acquired it")
    ((space, _, inside),) = by_space("generic", address)
    parts = [load_lanes(m, space, inside + np.uint64(64 * i), np.array([lane]), 8, 64) for i in range(2)]
    fields = np.concatenate(parts, 1).view(FIELDS)[0, 0]
    missing = [n for i, n in enumerate(FIELDS.names[:-1]) if not fields["given"] >> i & 1 and n not in OPTIONAL]
    if missing:
        raise PtxTrap(f"a bulk copy uses a tensor map without {', '.join(missing)}")
    return fields


def find_box(m: Machine, operand: TensorAddress, shared: int, lane: int) -> Box:
    fields = read_map(m, operand, lane)
    rank = int(fields["rank"]) + 1
    sizes, box = (fields[n][:rank].astype(np.int64) for n in ("global_dim", "box_dim"))
    if int(fields["elemtype"]) not in ELEMENTS or int(fields["swizzle_mode"]) not in SWIZZLE_BYTES or rank > 5:
        raise PtxTrap(f"no tensor map has these fields: {fields}")
    element = parse_type(ELEMENTS[int(fields["elemtype"])])
    strides = np.array([element.bytes, *fields["global_stride"][: rank - 1].astype(np.int64)])
    span = SWIZZLE_BYTES[int(fields["swizzle_mode"])]
    _check_map(fields, rank, box, strides, span, element)
    if shared % 128:
        raise PtxTrap(f"misaligned bulk copy: shared address {shared} is no multiple of 128")
    start = np.array([m.scalar(c, lane, 32) for c in operand.coordinates], np.uint32).view(np.int32).astype(np.int64)
    if len(start) != rank:
        raise PtxTrap(f"a bulk copy with {len(start)} coordinates uses a tensor map of rank {rank}")
    grid = np.indices(tuple(box[::-1])).reshape(rank, -1)[::-1]
    place = start[:, None] + grid
    linear = shared + element.bytes * np.arange(grid.shape[1])
    swizzled = linear ^ ((linear >> 7 & max(span // 16 - 1, 0)) << 4)
    m.shared.check_range(swizzled, element.bytes)
    inside = ((place >= 0) & (place < sizes[:, None])).all(0)
    addresses = int(fields["global_address"]) + (place * strides[:, None]).sum(0)
    base = int(m.shared_base[lane])
    return Box(swizzled + base, addresses.astype(np.uint64), inside, element.width, element, bool(fields["fill_mode"]))


def _check_map(fields: np.void, rank: int, box: Array, strides: Array, span: int, element: Type) -> None:
    """The rules a driver or the hardware holds a map to."""
    if fields["interleave_layout"] or (fields["element_stride"][:rank] != 1).any():
        raise UnknownInstruction("tensor maps with an interleave layout or element strides are not modelled")
    row = int(box[0]) * element.bytes
    if int(fields["global_address"]) % 16 or (strides[1:] % 16).any():
        raise PtxTrap(f"a tensor map needs addresses and strides in multiples of 16 bytes; strides {strides.tolist()}")
    if row % 16 or (box < 1).any() or (box > 256).any() or (span and row > span):
        raise PtxTrap(f"a tensor map has the box {box.tolist()} of {element.bytes}-byte elements, swizzled by {span}")


def _fill(box: Box) -> np.generic:
    """What elements outside the tensor read as."""
    zero = np.zeros((), f"u{box.width // 8}")
    return ~zero if box.nan_fill and box.element.is_float else zero


@opcode("cp.async.bulk.tensor")
def copy_box(m: Machine, ins: Instruction) -> None:
    if any(p in ins.modifiers for p in ("im2col", "tile::gather4", "tile::scatter4", "multicast::cluster")):
        raise UnknownInstruction(f"bulk copy is not modelled: {ins.text}")
    for lane in m.active():
        if isinstance(ins.operands[0], TensorAddress):
            _store_box(m, int(lane), ins.operands[0], ins.operands[1], None)
        else:
            _load_box(m, ins, int(lane))


@opcode("cp.reduce.async.bulk.tensor")
def reduce_box(m: Machine, ins: Instruction) -> None:
    name = next((p for p in ins.parts if p in REDUCTIONS), None)
    if name is None:
        raise UnknownInstruction(f"bulk reduction is not modelled: {ins.text}")
    for lane in m.active():
        _store_box(m, int(lane), ins.operands[0], ins.operands[1], name)


def _load_box(m: Machine, ins: Instruction, lane: int) -> None:
    target, source, barrier_address = ins.operands[:3]
    block = int(m.block_of[lane])
    box = find_box(m, source, int(m.address(target)[lane]), lane)
    barrier = barrier_at(m, int(m.address(barrier_address)[lane]), block)
    if box.inside.any():
        m.memory.locate(box.addresses[box.inside], box.width // 8)
    m.shared.start_bulk_copy(box.positions, box.width)
    lanes = np.full(box.positions.size, lane)
    m.note_global(box.addresses[box.inside], box.width // 8, lanes[box.inside], writes=False, engine=True)
    if m.races:
        m.races.start_write(box.positions, box.width // 8, lanes)
        m.races.advance_engine(block, int(m.warp_of[lane]))

    def land() -> int:
        values = np.full((box.positions.size, 1), _fill(box))
        if box.inside.any():
            values[box.inside] = m.memory.load(box.addresses[box.inside], box.width, 1)
        m.shared.finish_copy(box.positions, box.width, values, VISIBLE)
        if m.races:
            m.races.finish_write_by(box.positions, box.width // 8, np.full(lanes.size, m.races.engine))
            learn(m, barrier, block, m.races.engine)
        return box.bytes

    barrier.copies.append(land)


def _add(x: Array, y: Array) -> Array:
    """The addition in L2 flushes subnormal fp32 to zeros of their sign."""
    return _flush(_flush(x) + _flush(y))


def _flush(x: Array) -> Array:
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(0, x), x) if x.dtype == np.float32 else x


REDUCTIONS = {"add": _add, "min": np.minimum, "max": np.maximum}


def _store_box(m: Machine, lane: int, target: TensorAddress, source: Address, name: str | None) -> None:
    """Shared memory is read at the wait for the copy's group, so that what is overwritten too early shows."""
    block, warp = int(m.block_of[lane]), int(m.warp_of[lane])
    box = find_box(m, target, int(m.address(source)[lane]), lane)
    if box.inside.any():
        m.memory.locate(box.addresses[box.inside], box.width // 8)
    if m.races:
        m.races.advance_engine(block, warp)
        m.races.read_by(box.positions, box.width // 8, np.full(box.positions.size, m.races.engine))
    m.shared.load(box.positions, box.width, 1, ASYNC_READABLE_BIT)

    def finish(_: Array) -> None:
        values = m.shared.load(box.positions, box.width, 1, ASYNC_READABLE_BIT)[box.inside]
        addresses = box.addresses[box.inside]
        m.atomic = bool(name)
        m.note_global(addresses, box.width // 8, np.full(addresses.size, lane), writes=True, engine=True)
        m.atomic = False
        if addresses.size:
            if name:
                old = m.memory.load(addresses, box.width, 1)
                both = REDUCTIONS[name](decode(old, box.element), decode(values, box.element))
                values = encode(both, box.element)
            m.memory.store(addresses, box.width, values)
        if m.races:
            m.races.acquire(block, warp, m.races.release(block, m.races.engine))

    m.bulk_stores.add(np.array([lane]), finish)


@opcode("cp.async.bulk.commit_group")
def commit_bulk(m: Machine, ins: Instruction) -> None:
    m.bulk_stores.commit(m.active())


@opcode("cp.async.bulk.wait_group")
def wait_bulk(m: Machine, ins: Instruction) -> None:
    m.bulk_stores.wait(m.mask, ins.operands[0].bits)
