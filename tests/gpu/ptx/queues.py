"""Asynchronous work in groups, as cp.async, bulk stores and wgmma commit and wait for it.

Work is done as late as the program allows, at the wait that covers it: who relies on it earlier meets the old state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .values import Array


@dataclass
class Entry:
    lanes: Array
    group: Array
    finish: Callable[[Array], None]
    """Called with positions into `lanes` of those whose group has been waited for."""


class GroupQueue:
    """Groups are counted per lane, as divergent lanes commit and wait on their own."""

    def __init__(self, lanes: int) -> None:
        self.committed = np.zeros(lanes, np.int64)
        self.entries: list[Entry] = []

    def add(self, lanes: Array, finish: Callable[[Array], None]) -> None:
        self.entries.append(Entry(lanes, self.committed[lanes], finish))

    def commit(self, lanes: Array) -> None:
        self.committed[lanes] += 1

    def wait(self, mask: Array | None, pending: int) -> None:
        """Finish, in these lanes, all groups but the last `pending`."""
        left = []
        for entry in self.entries:
            done = entry.group < self.committed[entry.lanes] - pending
            if mask is not None:
                done &= mask[entry.lanes]
            if done.any():
                entry.finish(np.flatnonzero(done))
            if not done.all():
                entry.lanes, entry.group, entry.finish = _rest(entry, ~done)
                left.append(entry)
        self.entries = left


def _rest(entry: Entry, keep: Array) -> tuple[Array, Array, Callable[[Array], None]]:
    if keep.all():
        return entry.lanes, entry.group, entry.finish
    kept, finish = np.flatnonzero(keep), entry.finish
    return entry.lanes[kept], entry.group[kept], lambda positions: finish(kept[positions])
