"""Global, shared and local memory of the blocks that run together, with a trap for every access a GPU leaves undefined.

Shared memory carries one state byte per byte. Asynchronous copies deliver their data as late as the program allows, at
its wait; until then their destination is `IN_FLIGHT` and neither readable nor writable. What ordinary instructions have
written is not visible to the asynchronous proxy (wgmma, bulk copies) before a fence.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from .values import UNSIGNED, Array, PtxTrap

UNWRITTEN, WRITTEN, VISIBLE, IN_FLIGHT = 0, 1, 3, 4
READABLE_BIT, ASYNC_READABLE_BIT = 1, 2

# Shared and local memory as generic addresses. No mapping of a process lies here: user space ends below 2^57.
SHARED_WINDOW = 0x7800_0000_0000_0000
LOCAL_WINDOW = 0x7A00_0000_0000_0000
PARAMETER_WINDOW = 0x7C00_0000_0000_0000
WINDOWS = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAMETER_WINDOW}
WINDOW_BYTES = 0x0200_0000_0000_0000


def repeated(byte: int, width: int) -> np.generic:
    """A `width`-bit integer with every byte equal to `byte`."""
    return UNSIGNED[width](int.from_bytes(bytes([byte]) * (width // 8), "little"))


class Region:
    """The bytes of one tensor. `start` and `end` bound what may be accessed; the array starts on a 16-byte line.

    Of a matrix whose rows lie apart, `row` bytes from one to the next, only the first `width` bytes of each.
    """

    def __init__(self, start: int, end: int, owner: object, name: str, row: int = 1, width: int = 1) -> None:
        self.start, self.end, self.name, self.owner, self.row, self.width = start, end, name, owner, row, width
        self.base = start & ~15
        size = -(-(end - self.base) // 16) * 16
        raw = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.base))
        self.views = {width: raw.view(kind) for width, kind in UNSIGNED.items()}

    def check_gaps(self, addresses: Array, size: int) -> None:
        """Trap where an access lies between two rows."""
        if self.row == self.width:
            return
        at = (addresses - np.uint64(self.start)) % np.uint64(self.row)
        if (at + np.uint64(size) > self.width).any():
            raise PtxTrap(f"access of {size} bytes past the {self.width} of a row of {self.name}")


def tensor_region(tensor: torch.Tensor, name: str) -> Region | None:
    if not tensor.numel():
        return None
    if any(s < 0 for s in tensor.stride()):
        raise ValueError(f"execute: {name} has a negative stride")
    elements = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    size, rows = tensor.element_size(), tensor.dim() == 2 and len(tensor) > 1 and tensor.stride(1) == 1
    gaps = (tensor.stride(0) * size, tensor.shape[1] * size) if rows and tensor.stride(0) > tensor.shape[1] else ()
    return Region(start, start + elements * size, tensor, name, *gaps)


class GlobalMemory:
    def __init__(self, tensors: list[torch.Tensor]) -> None:
        if any(t.device.type != "cpu" for t in tensors):
            raise ValueError("execute: tensors must lie in CPU memory")
        found = (tensor_region(t, f"tensor {i} {list(t.shape)}") for i, t in enumerate(tensors))
        self.regions = [r for r in found if r]

    def locate(self, addresses: Array, size: int) -> list[tuple[Region, Array | slice]]:
        """Which tensor every access lies in: pairs of a region and the positions that fall into it."""
        low, high = int(addresses.min()), int(addresses.max()) + size
        for region in self.regions:
            if region.start <= low and high <= region.end:
                region.check_gaps(addresses, size)
                return [(region, slice(None))]
        left, parts = np.ones(addresses.shape, bool), []
        for region in self.regions:
            inside = left & (addresses >= region.start) & (addresses <= max(region.end - size, 0))
            if inside.any():
                region.check_gaps(addresses[inside], size)
                parts.append((region, np.flatnonzero(inside)))
                left &= ~inside
        if left.any():
            raise PtxTrap(self._out_of_bounds(int(addresses[left][0]), size, int(left.sum())))
        return parts

    def _out_of_bounds(self, address: int, size: int, count: int) -> str:
        message = f"out-of-bounds global access: {count} lanes, the first {size} bytes at {address:#x}"
        if not self.regions:
            return message + "; no tensors were given"
        nearest = min(self.regions, key=lambda r: max(r.start - address, address + size - r.end))
        after = address - nearest.start
        return f"{message}, byte {after} of {nearest.name}, which has {nearest.end - nearest.start}"

    def load(self, addresses: Array, width: int, count: int) -> Array:
        """[accesses, count] integers of `width` bits at each address."""
        out = np.empty((addresses.size, count), UNSIGNED[width])
        for region, where in self.locate(addresses, width // 8 * count):
            out[where] = region.views[width][_indices(addresses[where], region.base, width, count)]
        return out

    def store(self, addresses: Array, width: int, values: Array) -> None:
        count = values.shape[1]
        for region, where in self.locate(addresses, width // 8 * count):
            region.views[width][_indices(addresses[where], region.base, width, count)] = values[where]


def _indices(addresses: Array, base: int, width: int, count: int) -> Array:
    first = (addresses - np.uint64(base)).astype(np.int64) // (width // 8)
    return first[:, None] + np.arange(count) if count > 1 else first[:, None]


class SharedMemory:
    """Shared memory of several blocks, one after another; addresses are offsets within a block."""

    def __init__(self, size: int, blocks: int) -> None:
        self.size = size
        self.stride = -(-max(size, 1) // 1024) * 1024
        self.bytes = np.full(blocks * self.stride, 0xFF, np.uint8)
        self.state = np.zeros(blocks * self.stride, np.uint8)
        self.views = {w: self.bytes.view(k) for w, k in UNSIGNED.items()}
        self.state_views = {w: self.state.view(k) for w, k in UNSIGNED.items()}

    def check_range(self, addresses: Array, size: int) -> None:
        if addresses.size and int(addresses.max()) + size > self.size:
            worst = int(addresses.max())
            raise PtxTrap(f"shared memory out of range: {size} bytes at {worst}, the block has {self.size}")

    def load(self, positions: Array, width: int, count: int = 1, bit: int = READABLE_BIT) -> Array:
        """[accesses, count] integers at byte `positions` of the whole array."""
        index = _positions(positions, width, count)
        self.require(index, width, bit)
        return self.views[width][index]

    def require(self, index: Array, width: int, bit: int) -> None:
        """Trap unless every byte of these elements has `bit` in its state."""
        wanted = repeated(bit, width)
        good = (self.state_views[width][index] & wanted) == wanted
        if not good.all():
            element = int(index[~good][0])
            found = self.state[element * (width // 8) : (element + 1) * (width // 8)]
            at = element * (width // 8) % self.stride
            raise PtxTrap(f"shared memory read at byte {at} {_why_not_readable(found, bit)}")

    def store(self, positions: Array, width: int, values: Array, state: int = WRITTEN) -> None:
        index = _positions(positions, width, values.shape[1])
        self.require_settled(index, width)
        self.views[width][index] = values
        self.state_views[width][index] = repeated(state, width)

    def require_settled(self, index: Array, width: int) -> None:
        """Trap where an asynchronous copy is still writing."""
        busy = (self.state_views[width][index] & repeated(IN_FLIGHT, width)) != 0
        if busy.any():
            at = int(index[busy][0]) * (width // 8) % self.stride
            raise PtxTrap(f"shared memory written at byte {at} while an asynchronous copy to it is in flight")

    def start_copy(self, positions: Array, width: int, count: int = 1) -> None:
        """An asynchronous copy begins: its destination holds nothing until `finish_copy`."""
        index = _positions(positions, width, count)
        self.require_settled(index, width)
        self.state_views[width][index] = repeated(IN_FLIGHT, width)

    def start_bulk_copy(self, positions: Array, width: int) -> None:
        """The asynchronous proxy begins to write, where no ordinary write may still be under way."""
        index = _positions(positions, width, 1)
        unfenced = self.state_views[width][index] == repeated(WRITTEN, width)
        if unfenced.any():
            at = int(index[unfenced][0]) * (width // 8) % self.stride
            raise PtxTrap(f"bulk copy to shared memory at byte {at}, written before, without fence.proxy.async")
        self.start_copy(positions, width)

    def finish_copy(self, positions: Array, width: int, values: Array, state: int) -> None:
        index = _positions(positions, width, values.shape[1])
        self.views[width][index] = values
        self.state_views[width][index] = repeated(state, width)

    def fence_async(self, block: int) -> None:
        """fence.proxy.async: what is written so far becomes visible to the asynchronous proxy."""
        state = self.state_views[64][block * self.stride // 8 : (block + 1) * self.stride // 8]
        state |= (state & repeated(WRITTEN, 64)) << np.uint64(1)


def _positions(positions: Array, width: int, count: int) -> Array:
    first = positions // (width // 8)
    return first[:, None] + np.arange(count) if count > 1 else first[:, None]


def _why_not_readable(state: Array, bit: int) -> str:
    if (state & IN_FLIGHT).any():
        return "before the wait for the asynchronous copy to it"
    if (state & READABLE_BIT).all() and bit == ASYNC_READABLE_BIT:
        return "by the asynchronous proxy without fence.proxy.async"
    return "before anything was written there"


class LocalMemory:
    """One stack frame per lane."""

    def __init__(self, size: int, lanes: int) -> None:
        self.size = size
        self.stride = -(-size // 16) * 16
        raw = np.full(max(1, lanes * self.stride), 0xFF, np.uint8)
        raw = raw[: raw.size // 8 * 8] if raw.size >= 8 else np.zeros(8, np.uint8)
        self.views = {w: raw.view(k) for w, k in UNSIGNED.items()}

    def _index(self, addresses: Array, lanes: Array, width: int, count: int) -> Array:
        if addresses.size and int(addresses.max()) + width // 8 * count > self.size:
            raise PtxTrap(f"local memory out of range: byte {int(addresses.max())} of {self.size}")
        return _positions(addresses.astype(np.int64) + lanes * self.stride, width, count)

    def load(self, addresses: Array, lanes: Array, width: int, count: int) -> Array:
        return self.views[width][self._index(addresses, lanes, width, count)]

    def store(self, addresses: Array, lanes: Array, width: int, values: Array) -> None:
        self.views[width][self._index(addresses, lanes, width, values.shape[1])] = values
