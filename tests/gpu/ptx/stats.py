"""Coalescing and bank conflicts of a kernel, from the addresses it really used.

    recorder = Recorder()
    execute(..., recorder=recorder)
    recorder.total("global").sectors_per_request

Counted per warp instruction, as a profiler does: distinct 32-byte sectors in global memory, and in shared memory the
passes over its 32 banks, where distinct words in one bank take turns. Bulk copies and wgmma operands do not pass here.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from .syntax import Instruction
from .values import WARP, Array

SECTOR_BYTES, BANKS, WORD_BYTES = 32, 32, 4
PHASE_BYTES = BANKS * WORD_BYTES


@dataclass
class Traffic:
    """Requests are warp instructions. `units` are sectors (global) or passes over the banks (shared), `least_units`
    what the same bytes need at best; `bytes` counts what the lanes asked for, the same address once per warp."""

    requests: int = 0
    units: int = 0
    least_units: int = 0
    bytes: int = 0

    @property
    def sectors_per_request(self) -> float:
        return self.units / self.requests if self.requests else 0.0

    @property
    def conflicts(self) -> int:
        """Passes, or sectors, beyond the least."""
        return self.units - self.least_units

    @property
    def efficiency(self) -> float:
        """Least over actual: 1 where every access is coalesced or free of conflicts."""
        return self.least_units / self.units if self.units else 1.0

    def __iadd__(self, other: Traffic) -> Traffic:
        self.requests += other.requests
        self.units += other.units
        self.least_units += other.least_units
        self.bytes += other.bytes
        return self


class Recorder:
    """Traffic per memory ("global", "shared") and per instruction; one recorder may see several launches."""

    def __init__(self) -> None:
        self.instruction: Instruction | None = None
        self.traffic: dict[tuple[str, str], Traffic] = defaultdict(Traffic)

    def access(self, space: str, addresses: Array, lanes: Array, size: int) -> None:
        """One access of `size` bytes by each of `lanes`; warps are told apart by lane number."""
        count = {"global": global_traffic, "shared": shared_traffic}.get(space)
        if count and lanes.size:
            text = self.instruction.text if self.instruction else ""
            self.traffic[space, text] += count(addresses.astype(np.int64), lanes // WARP, lanes % WARP, size)

    def total(self, space: str) -> Traffic:
        result = Traffic()
        for (where, _), traffic in self.traffic.items():
            if where == space:
                result += traffic
        return result

    def worst(self, space: str, count: int = 5) -> list[tuple[str, Traffic]]:
        """The instructions with most units beyond the least, worst first."""
        found = [(text, traffic) for (where, text), traffic in self.traffic.items() if where == space]
        return sorted(found, key=lambda item: -item[1].conflicts)[:count]


def _distinct(*keys: Array) -> list[Array]:
    """The distinct combinations of the keys, as columns."""
    rows = np.unique(np.stack([k.ravel() for k in keys], 1), axis=0)
    return list(rows.T)


def global_traffic(addresses: Array, warps: Array, lane: Array, size: int) -> Traffic:
    spans = np.arange(0, max(size, 1), SECTOR_BYTES)
    sector_warps, _ = _distinct(np.repeat(warps, spans.size), (addresses[:, None] + spans) // SECTOR_BYTES)
    byte_warps, _ = _distinct(warps, addresses)
    active, per_warp = np.unique(byte_warps, return_counts=True)
    least = -(-per_warp * size // SECTOR_BYTES)
    return Traffic(active.size, sector_warps.size, int(least.sum()), byte_warps.size * size)


def shared_traffic(addresses: Array, warps: Array, lane: Array, size: int) -> Traffic:
    """Accesses wider than a word go in phases of the lanes that fill all banks: 16 for 8 bytes, 8 for 16."""
    lanes_per_phase = min(WARP, PHASE_BYTES // max(size, WORD_BYTES))
    phases = warps * WARP + lane // lanes_per_phase
    words = addresses[:, None] // WORD_BYTES + np.arange(max(1, size // WORD_BYTES))
    phase, word = _distinct(np.repeat(phases, words.shape[1]), words)
    _, index = np.unique(phase, return_inverse=True)
    per_bank = np.zeros((int(index.max()) + 1, BANKS), np.int64)
    np.add.at(per_bank, (index, word % BANKS), 1)
    distinct_warps, _ = _distinct(warps, addresses)
    return Traffic(np.unique(warps).size, int(per_bank.max(1).sum()), len(per_bank), distinct_warps.size * size)
