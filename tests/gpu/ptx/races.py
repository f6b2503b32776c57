"""Which accesses to shared memory no barrier orders, by vector clocks.

Every warp, and the asynchronous copy engine as one more agent, counts its own time and knows how much of every other
agent's time it has synchronised with. An access races with an earlier one its agent does not know of. Among the lanes
of one warp `WarpRaces` looks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .global_races import smallest_access
from .values import WARP, Array, PtxTrap
from .warp_races import WarpRaces

if TYPE_CHECKING:
    from .machine import Machine


class RaceDetector:
    def __init__(self, m: Machine) -> None:
        self.granule = smallest_access(m.kernel, "shared")
        words = m.shared.bytes.size // self.granule
        self.warps = m.block_lanes // WARP
        self.engine = self.warps
        agents = self.warps + 1
        self.block_words = m.shared.stride // self.granule
        self.warp_of = m.warp_of
        # known[block, a, b]: how far agent a knows agent b's time.
        self.known = np.zeros((m.block_count, agents, agents), np.int64)
        self.known[:, np.arange(agents), np.arange(agents)] = 1
        self.writer = np.zeros(words, np.int64)
        self.written = np.zeros(words, np.int64)
        self.read_time = np.zeros((words, agents), np.int32)
        self.block_of = m.block_of
        self.within = WarpRaces(m, words, self.granule)

    def _words(self, positions: Array, size: int, owners: Array) -> tuple[Array, Array, Array]:
        """Word indices, their agents and blocks, one entry per word touched."""
        span = max(1, size // self.granule)
        words = (positions[:, None] // self.granule + np.arange(span)).ravel()
        return words, np.repeat(owners, span), words // self.block_words

    def read(self, positions: Array, size: int, lanes: Array) -> None:
        self.read_by(positions, size, self.warp_of[lanes])
        self.within.read(*self._words(positions, size, lanes)[:2])

    def read_by(self, positions: Array, size: int, agents: Array) -> None:
        words, agents, blocks = self._words(positions, size, agents)
        writer = self.writer[words]
        bad = self.written[words] > self.known[blocks, agents, writer]
        self._trap(bad, words, "read", "a write")
        self.read_time[words, agents] = self.known[blocks, agents, agents]

    def write(self, positions: Array, size: int, lanes: Array) -> None:
        self.start_write(positions, size, lanes)
        self.finish_write(positions, size, lanes)

    def start_write(self, positions: Array, size: int, lanes: Array) -> None:
        """From here on earlier readers and writers must be done."""
        words, agents, blocks = self._words(positions, size, self.warp_of[lanes])
        bad = self.written[words] > self.known[blocks, agents, self.writer[words]]
        self._trap(bad, words, "write", "a write")
        late = (self.read_time[words] > self.known[blocks, agents]).any(1)
        self._trap(late, words, "write", "a read")
        self.within.start_write(*self._words(positions, size, lanes)[:2])

    def finish_write(self, positions: Array, size: int, lanes: Array) -> None:
        self.finish_write_by(positions, size, self.warp_of[lanes])
        self.within.finish_write(*self._words(positions, size, lanes)[:2])

    def finish_write_by(self, positions: Array, size: int, agents: Array) -> None:
        words, agents, blocks = self._words(positions, size, agents)
        self.writer[words] = agents
        self.written[words] = self.known[blocks, agents, agents]

    def _trap(self, bad: Array, words: Array, access: str, other: str) -> None:
        if bad.any():
            at = int(words[bad][0] % self.block_words) * self.granule
            raise PtxTrap(f"race in shared memory at byte {at}: a {access} that no barrier orders after {other}")

    def synchronise(self, lanes: Array) -> None:
        """A barrier: the warps of these lanes learn all that any of them knows."""
        self.within.barrier(lanes)
        for block in np.unique(self.block_of[lanes]):
            warps = np.unique(self.warp_of[lanes[self.block_of[lanes] == block]])
            self.known[block, warps] = self.known[block, warps].max(0)
            self.known[block, warps, warps] += 1

    def advance_engine(self, block: int, warp: int) -> int:
        """The copy engine starts on behalf of a warp, whose past it knows. Returns its new time."""
        engine = self.known[block, self.engine]
        time = engine[self.engine] + 1
        self.known[block, self.engine] = np.maximum(engine, self.known[block, warp])
        self.known[block, self.engine, self.engine] = time
        return int(time)

    def release(self, block: int, agent: int) -> Array:
        """What an agent knows now, for whoever acquires it; its later accesses count as later."""
        snapshot = self.known[block, agent].copy()
        self.known[block, agent, agent] += 1
        return snapshot

    def acquire(self, block: int, agent: int, snapshot: Array) -> None:
        self.within.barrier(np.flatnonzero((self.block_of == block) & (self.warp_of == agent)))
        self.known[block, agent] = np.maximum(self.known[block, agent], snapshot)
