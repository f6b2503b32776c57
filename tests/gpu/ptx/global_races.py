"""Which accesses to global memory nothing orders.

Threads of one block are ordered by its barriers, as in shared memory (`races`). Blocks are not ordered at all within a
launch: one that reads or writes what another has written, or writes what another has read, is wrong, unless both use
atomics. Of several readers only the last is remembered: some races are missed, none is invented.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .memory import GlobalMemory, Region
from .syntax import Kernel
from .values import Array, PtxTrap

if TYPE_CHECKING:
    from .machine import Machine

NOBODY = -1


def smallest_access(kernel: Kernel, space: str) -> int:
    """Bytes of the narrowest access to a memory: what has to be told apart there, up to 4."""
    widths = [
        ins.type.bytes
        for ins in kernel.instructions
        if ins.opcode in ("ld", "st", "atom", "red") and not {"global", "shared", "param"} & ins.modifiers - {space}
    ]
    return min([4, *widths])


class History:
    """Last writer and last reader of every unit of one tensor: block, agent (warp or copy engine) and its time."""

    def __init__(self, units: int) -> None:
        self.write = np.full((3, units), NOBODY, np.int64)
        self.read = np.full((3, units), NOBODY, np.int64)


class GlobalRaces:
    def __init__(self, memory: GlobalMemory, granule: int) -> None:
        self.memory, self.granule = memory, granule
        self.histories: dict[int, History] = {}

    def access(self, m: Machine, addresses: Array, size: int, lanes: Array, agents: Array, *, writes: bool) -> None:
        """One access of `size` bytes per lane, carried out by an agent of the lane's block."""
        for region, where in self.memory.locate(addresses, size):
            history = self.histories.setdefault(id(region), History(-(-(region.end - region.base) // self.granule)))
            first = (addresses[where] - np.uint64(region.base)).astype(np.int64) // self.granule
            span = max(1, size // self.granule)
            units = (first[:, None] + np.arange(span)).ravel()
            agent, block = np.repeat(agents[where], span), np.repeat(m.block_of[lanes[where]], span)
            self._check(m, history.write, units, block, agent, region, "write" if writes else "read", "a write")
            if writes:
                self._check_at_once(units, block, agent, region)
                self._check(m, history.read, units, block, agent, region, "write", "a read")
            now = m.races.known[block, agent, agent]
            (history.write if writes else history.read)[:, units] = m.first_block + block, agent, now

    def _check_at_once(self, units: Array, block: Array, agent: Array, region: Region) -> None:
        """The warps of one instruction: their writes meet no barrier either."""
        writers = np.unique(np.stack([units, block, agent]), axis=1)[0]
        twice = writers[1:][writers[1:] == writers[:-1]]
        if twice.size:
            at = int(twice[0]) * self.granule - (region.start - region.base)
            raise PtxTrap(f"race in {region.name} at byte {at}: two warps write it in one instruction")

    def _check(
        self,
        m: Machine,
        earlier: Array,
        units: Array,
        block: Array,
        agent: Array,
        region: Region,
        access: str,
        other: str,
    ) -> None:
        theirs, who, when = earlier[:, units]
        elsewhere = (theirs != NOBODY) & (theirs != m.first_block + block)
        here = (theirs == m.first_block + block) & (when > m.races.known[block, agent, np.maximum(who, 0)])
        if elsewhere.any() or here.any():
            at = int(units[elsewhere | here][0]) * self.granule - (region.start - region.base)
            whose = "another block" if elsewhere.any() else "another warp, without a barrier between"
            raise PtxTrap(f"race in {region.name} at byte {at}: a {access} after {other} by {whose}")
