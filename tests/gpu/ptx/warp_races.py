"""Which accesses to shared memory by the lanes of one warp no barrier of theirs orders.

Lanes of a warp need not run in step: what one writes another may read, and what one has read another may overwrite,
only behind a bar.warp.sync or a barrier of the block. Some races are missed, none is invented: two lanes that write one
word by one instruction, and lanes that a barrier of part of a warp does not name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .values import WARP, Array, PtxTrap

if TYPE_CHECKING:
    from .machine import Machine


class WarpRaces:
    """Per word the lane that wrote it last, the lowest and the highest lane that have read it since, and when: in
    barriers of their warp so far. Words here are those of the block's own race detector."""

    def __init__(self, m: Machine, words: int, granule: int) -> None:
        self.warp_of, self.granule = np.arange(m.lanes) // WARP, granule  # among all warps of all blocks
        self.time = np.zeros(m.lanes // WARP, np.int64)
        self.writer, self.written = np.zeros(words, np.int64), np.full(words, -1)
        self.lowest, self.highest, self.read_at = (np.full(words, -1) for _ in range(3))

    def barrier(self, lanes: Array) -> None:
        self.time[np.unique(self.warp_of[lanes])] += 1

    def read(self, words: Array, lanes: Array) -> None:
        now, warps = self.time[self.warp_of[lanes]], self.warp_of[lanes]
        writer = self.writer[words]
        self._trap((self.written[words] == now) & (self.warp_of[writer] == warps) & (writer != lanes), words, "read")
        new = (self.read_at[words] != now) | (self.warp_of[self.lowest[words]] != warps)
        self.lowest[words[new]], self.highest[words[new]] = len(self.warp_of) - 1, 0
        self.read_at[words] = now
        np.minimum.at(self.lowest, words, lanes)
        np.maximum.at(self.highest, words, lanes)

    def start_write(self, words: Array, lanes: Array) -> None:
        now, warps = self.time[self.warp_of[lanes]], self.warp_of[lanes]
        low, high, writer = self.lowest[words], self.highest[words], self.writer[words]
        after_read = (self.read_at[words] == now) & (self.warp_of[low] == warps) & ((low != lanes) | (high != lanes))
        after_write = (self.written[words] == now) & (self.warp_of[writer] == warps) & (writer != lanes)
        self._trap(after_read | after_write, words, "write")

    def finish_write(self, words: Array, lanes: Array) -> None:
        self.writer[words], self.written[words] = lanes, self.time[self.warp_of[lanes]]

    def _trap(self, bad: Array, words: Array, access: str) -> None:
        if bad.any():
            at = int(words[bad][0]) * self.granule
            raise PtxTrap(f"race in shared memory at byte {at}: a {access} that no barrier of the warp orders")
