"""Intervals of a mean by resampling images (Efron and Tibshirani, An Introduction to the Bootstrap, section 13.3)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from limber_fast import checks

_CHUNK = 1 << 22  # draws held at once


class Interval(NamedTuple):
    """A mean between its bounds."""

    mean: float
    low: float
    high: float


def bootstrap_interval(scores: Sequence[float] | np.ndarray, **options: Any) -> Interval:
    """Mean of `scores` [N] and its interval: `bootstrap_intervals` of one column."""
    scores = np.asarray(scores, np.float64)
    checks.one_score_per_row("bootstrap_interval", "scores", scores)
    return bootstrap_intervals(scores[:, None], **options)[0]


def bootstrap_intervals(
    scores: np.ndarray,
    *,
    images: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> list[Interval]:
    """Mean of each column of `scores` and its percentile interval, all over the same resampled images.

    The difference of two models is a column of its own: the differences of their scores, row by row.

    Args:
        scores: [N, C], finite.
        images: [N], what each row is of, where an image has several: as its questions are not independent, all
            rows of an image are drawn together. None: every row is of an image of its own.
        confidence: the share of resampled means inside.
    Returns: C means with their bounds; all three are the same for one image.
    Raises: ValueError for scores that are not finite, images that are not one per row, or a confidence outside (0, 1).
    """
    scores = np.asarray(scores, np.float64)
    checks.scores_in_columns("bootstrap_intervals", "scores", scores)
    checks.finite_scores("bootstrap_intervals", "scores", scores)
    checks.open_share("bootstrap_intervals", "confidence", confidence)
    checks.size("bootstrap_intervals", "resamples", resamples)
    sums, counts = scores, np.ones(len(scores))
    if images is not None:
        checks.as_long("bootstrap_intervals", "images", images, "scores", scores)
        numbers: dict[Hashable, int] = {}
        owner = [numbers.setdefault(image, len(numbers)) for image in images]
        sums, counts = np.zeros((len(numbers), scores.shape[1])), np.bincount(owner).astype(np.float64)
        np.add.at(sums, owner, scores)

    generator = np.random.default_rng(seed)
    means = []
    drawable = len(sums)
    step = max(1, _CHUNK // drawable)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = generator.integers(drawable, size=(rows, drawable)) + drawable * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * drawable).reshape(rows, drawable).astype(np.float64)
        means.append(times @ sums / (times @ counts)[:, None])
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail], axis=0)
    return [Interval(*map(float, bounds)) for bounds in zip(scores.mean(0), low, high, strict=True)]
