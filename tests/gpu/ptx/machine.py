"""State of the blocks that run together: registers of all their lanes, memories, and what is still under way.

Every register is one NumPy array over all lanes, or a single value where all lanes agree. `mask` says which lanes the
current instruction runs in; None stands for all of them.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from .memory import GlobalMemory, LocalMemory, SharedMemory
from .syntax import Immediate, Kernel, Register, Special, Symbol
from .values import PREDICATE, UNSIGNED, WARP, Array, PtxTrap, Type, UnknownInstruction, decode, encode

if TYPE_CHECKING:
    from .control import BlockBarriers
    from .global_races import GlobalRaces
    from .mbarrier import Barrier
    from .queues import GroupQueue
    from .races import RaceDetector
    from .stats import Recorder


class Machine:
    def __init__(
        self, kernel: Kernel, grid: tuple[int, ...], block: tuple[int, ...], blocks: range, parameters: bytes,
        memory: GlobalMemory, shared_bytes: int,
    ) -> None:  # fmt: skip
        self.kernel, self.parameters, self.memory = kernel, parameters, memory
        self.threads = int(np.prod(block))
        self.block_lanes = -(-self.threads // WARP) * WARP
        self.block_count = len(blocks)
        self.lanes = self.block_lanes * self.block_count
        self.shared = SharedMemory(kernel.static_shared + shared_bytes, self.block_count)
        self.local = LocalMemory(kernel.local_bytes, self.lanes)
        self.block_of = np.repeat(np.arange(self.block_count), self.block_lanes)
        self.shared_base = self.block_of * self.shared.stride
        self.thread = np.tile(np.arange(self.block_lanes, dtype=np.uint32), self.block_count)
        self.warp_of = self.thread.astype(np.int64) // WARP
        self.all_lanes = np.arange(self.lanes)
        self.alive = self.thread < self.threads
        self.special = self._special_registers(grid, block, blocks)
        self.registers: dict[str, Array] = {}
        self.undefined: dict[str, Array] = {}
        self.mask: Array | None = None
        self.passes_on = False
        """Whether the current instruction may read undefined lanes: its result is undefined there."""
        self.taint: Array | None = None
        """Lanes in which the current instruction has read something undefined."""
        self.counts: Counter[str] = Counter()
        self.copies: GroupQueue
        self.bulk_stores: GroupQueue
        self.products: GroupQueue
        self.block_barriers: BlockBarriers
        self.barriers: dict[tuple[int, int], Barrier] = {}
        """mbarriers by block and shared address."""
        self.published_maps: set[int] = set()
        """Addresses of tensor maps that no fence has acquired yet."""
        self.accumulators: dict[str, Array] = {}
        """Registers that wgmma is writing, by name, and how many products are under way per lane."""
        self.pending: dict[tuple[str, ...], Array] = {}
        self.fenced: dict[str, Array] = {}
        """The registers as the last wgmma.fence saw them."""
        self.first_block = blocks.start
        self.races: RaceDetector | None = None
        self.global_races: GlobalRaces | None = None
        self.copies_need_fence = True
        self.atomic = False
        """While an atomic runs: its accesses race with ordinary ones only."""
        self.recorder: Recorder | None = None

    def _special_registers(self, grid: tuple[int, ...], block: tuple[int, ...], blocks: range) -> dict[str, Array]:
        number = np.asarray(blocks, np.uint32)[self.block_of]
        thread = self.thread
        values = {
            "tid.x": thread % block[0], "tid.y": thread // block[0] % block[1],
            "tid.z": thread // (block[0] * block[1]),
            "ctaid.x": number % grid[0], "ctaid.y": number // grid[0] % grid[1],
            "ctaid.z": number // (grid[0] * grid[1]),
            "laneid": thread % WARP, "warpid": thread // WARP,
            "lanemask_lt": (1 << (thread % WARP)) - 1, "lanemask_eq": 1 << (thread % WARP),
        }  # fmt: skip
        for axis, blocks_along, threads_along in zip("xyz", grid, block, strict=True):
            values[f"nctaid.{axis}"], values[f"ntid.{axis}"] = np.array(blocks_along), np.array(threads_along)
        return {name: np.asarray(v).astype(np.uint32) for name, v in values.items()}

    # Registers

    def bits(self, operand: Any, width: int) -> Array:
        """An operand's low `width` bits, over all lanes or as one value for all of them."""
        kind = type(operand)
        if kind is Register:
            value = self.registers.get(operand.name)
            if value is None or self.undefined:
                self.require_defined(operand.name)
            return value if value.dtype.itemsize * 8 == width else value.astype(UNSIGNED[width])
        if kind is Immediate:
            return np.array(operand.bits & ((1 << width) - 1), UNSIGNED[width])
        if kind is Special:
            if operand.name not in self.special:
                raise UnknownInstruction(f"special register %{operand.name}")
            return self.special[operand.name].astype(UNSIGNED[width])
        if kind is Symbol:
            return np.array(self.symbol(operand.name), UNSIGNED[width])
        raise UnknownInstruction(f"operand {operand}")

    def symbol(self, name: str) -> int:
        for table in (self.kernel.shared, self.kernel.local):
            if name in table:
                return table[name]
        raise UnknownInstruction(f"symbol {name}")

    def require_defined(self, name: str) -> None:
        if name not in self.registers:
            if name in self.kernel.register_bits:
                raise PtxTrap(f"register {name} is read before it is written, or while a wgmma is writing it")
            raise UnknownInstruction(f"register {name}")
        missing = self.undefined.get(name)
        if missing is None:
            return
        missing = missing if self.mask is None else missing & self.mask
        if missing.any():
            if not self.passes_on:
                raise PtxTrap(f"register {name} is used in a lane where it is undefined")
            self.taint = missing if self.taint is None else self.taint | missing

    def predicate(self, operand: Any) -> Array:
        if type(operand) is Immediate:
            return np.array(bool(operand.bits))
        name = operand.name
        value = self.registers.get(name.lstrip("!"))
        if value is None or self.undefined:
            self.require_defined(name.lstrip("!"))
        return ~value if name[0] == "!" else value

    def value(self, operand: Any, kind: Type) -> Array:
        """An operand read as numbers of a type, of one number: packed ones are `unpack`ed by who knows them."""
        if kind.kind == "pred":
            return self.predicate(operand)
        if kind.lanes != 1:
            raise UnknownInstruction(f"{operand} as packed numbers")
        return decode(self.bits(operand, kind.width), kind)

    def full_bits(self, operand: Any, width: int) -> Array:
        return self.full(self.bits(operand, width))

    def full(self, values: Array) -> Array:
        """One value per lane."""
        return values if values.ndim else np.broadcast_to(values, (self.lanes,))

    def write(self, register: Any, bits: Array) -> None:
        """Write register bits in the active lanes; a wider register is zero-extended."""
        if register.name != "_":
            self.write_named(register.name, bits)

    def write_named(self, name: str, bits: Array) -> None:
        self._replace(name, bits)
        if self.taint is not None:
            self.undefined[name] = self.taint | self.undefined.get(name, False)

    def _replace(self, name: str, bits: Array) -> None:
        width = self.kernel.register_bits[name]
        bits = np.asarray(bits)
        if width > 1 and bits.dtype.itemsize * 8 != width:
            bits = bits.astype(UNSIGNED[width])
        if self.mask is None:
            self.registers[name] = bits
            if self.undefined:
                self.undefined.pop(name, None)
            return
        old = self.registers.get(name)
        if old is None:
            old = np.zeros(1, bool if width == 1 else UNSIGNED[width])[0]
            self.undefined[name] = ~self.mask
        elif name in self.undefined:
            left = self.undefined[name] & ~self.mask
            if left.any():
                self.undefined[name] = left
            else:
                del self.undefined[name]
        self.registers[name] = np.where(self.mask, bits, old)

    def put(self, register: Any, values: Array, kind: Type) -> None:
        """Write numbers of a type; a wider register is sign- or zero-extended as the type says."""
        if kind.kind == "s" and register.name != "_" and self.kernel.register_bits[register.name] > kind.width:
            values = encode(values, kind).view(decode(np.zeros(1, UNSIGNED[kind.width]), kind).dtype)
            kind = Type("s", self.kernel.register_bits[register.name])
        self.write(register, encode(values, kind))

    def put_predicate(self, register: Any, values: Array) -> None:
        self.put(register, values, PREDICATE)

    def discard(self, name: str, lanes: Array | None) -> None:
        """The register's value is lost in these lanes until it is written again."""
        if lanes is None or name not in self.registers:
            self.registers.pop(name, None)
            self.undefined.pop(name, None)
        else:
            self.undefined[name] = self.undefined.get(name, np.zeros(self.lanes, bool)) | lanes

    # Lanes

    def active(self) -> Array:
        """Indices of the lanes this instruction runs in."""
        return self.all_lanes if self.mask is None else np.flatnonzero(self.mask)

    def active_blocks(self) -> Array:
        return np.unique(self.block_of[self.active()])

    def whole_warps(self, what: str) -> Array:
        """First lanes of the active warps. Traps where part of a warp is missing."""
        if self.mask is None:
            return self.all_lanes[::WARP]
        by_warp = self.mask.reshape(-1, WARP)
        if (by_warp.any(1) & ~by_warp.all(1)).any():
            raise PtxTrap(f"{what} reached by part of a warp")
        return np.flatnonzero(by_warp.any(1)) * WARP

    def note_global(self, addresses: Array, size: int, lanes: Array, *, writes: bool, engine: bool = False) -> None:
        """Tell the race check of an access to global memory, by the lanes' warps or by the copy engine for them."""
        if self.global_races and addresses.size:
            agents = np.full(lanes.size, self.races.engine) if engine else self.warp_of[lanes]
            self.global_races.access(self, addresses, size, lanes, agents, writes=writes and not self.atomic)

    def scalar(self, operand: Any, lane: int, width: int) -> int:
        return int(self.full_bits(operand, width)[lane])

    def address(self, operand: Any) -> Array:
        """Addresses per lane of `[base+offset]`, in 64 bits."""
        base = self.full_bits(operand.base, 64)
        return base + np.uint64(operand.offset & (2**64 - 1)) if operand.offset else base
