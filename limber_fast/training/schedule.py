"""The budget is time, not steps: a slow machine takes fewer steps and still anneals to zero."""

from __future__ import annotations

import math
import time
from collections.abc import Callable


class TimeBudget:
    """A stop-watch with an end that pauses for saving and evaluation and survives a resume.

    Args:
        seconds: the whole budget.
        spent: seconds already used by an earlier run.
        clock: seconds as a float; wall time by default, `time.process_time` to compare settings on a busy machine.
    """

    def __init__(self, seconds: float, spent: float = 0.0, clock: Callable[[], float] = time.perf_counter):
        self.seconds = seconds
        self._clock = clock
        self._banked = spent
        self._since: float | None = None

    def start(self) -> None:
        self._since = self._clock()

    def pause(self) -> None:
        self._banked, self._since = self.spent, None

    @property
    def spent(self) -> float:
        return self._banked + (0.0 if self._since is None else self._clock() - self._since)

    @property
    def fraction(self) -> float:
        """Share of the budget used, in [0, 1]."""
        return min(self.spent / self.seconds, 1.0)


def warmup_cosine(fraction: float, warmup: float) -> float:
    """Learning-rate factor: linear from 0 to 1 over `warmup`, then half a cosine to 0 at fraction 1."""
    if fraction < warmup:
        return fraction / warmup
    return 0.5 * (1 + math.cos(math.pi * min((fraction - warmup) / (1 - warmup), 1.0)))
