"""The training curve: averages over intervals, kept in the checkpoint and as a CSV file."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

from limber_fast import files

CLIP_COLUMNS = ("step", "seconds", "loss", "scale", "grad_norm", "learning_rate")
LIMBER_COLUMNS = ("step", "seconds", "loss", "grad_norm", "learning_rate")
COLUMNS = ("step", "seconds", "loss", "image_text_loss", "image_image_loss", "scale", "accuracy", "learning_rate")


class History:
    """Collects one dict per step and closes a row of means every `interval` of the budget."""

    def __init__(
        self, rows: list[dict[str, float]] | None = None, interval: float = 0.01, columns: tuple[str, ...] = COLUMNS
    ):
        self.rows, self.columns = list(rows or []), columns
        self.interval = interval
        self._sums: dict[str, float] = defaultdict(float)
        self._count = 0
        self._closed_at = 0.0
        self.smooth: dict[str, float] = {}

    def add(self, step: int, seconds: float, fraction: float, values: dict[str, float]) -> None:
        """One step's values; `smooth` is their running mean over about 20 steps, for the progress bar."""
        for name, value in values.items():
            self._sums[name] += value
            self.smooth[name] = 0.95 * self.smooth.get(name, value) + 0.05 * value
        self._count += 1
        if fraction >= self._closed_at + self.interval or fraction >= 1:
            self.close(step, seconds)
            self._closed_at = fraction

    def close(self, step: int, seconds: float) -> None:
        """End the open interval, if any step fell into it."""
        if self._count:
            means = {name: total / self._count for name, total in self._sums.items()}
            self.rows.append({"step": step, "seconds": round(seconds, 3), **means})
            self._sums.clear()
            self._count = 0

    def write_csv(self, path: Path) -> None:
        """Replace `path` in one rename."""
        with files.replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows({name: f"{value:.6g}" for name, value in row.items()} for row in self.rows)
