"""Intervals of a mean by resampling images (Efron and Tibshirani, An Introduction to the Bootstrap, section 13.3)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from limber_fast import checks

_CHUNK = 1 << 22  # draws held at once


class Interval(NamedTuple):
    """A mean between its bounds."""

    mean: float
    low: float
    high: float


def bootstrap_interval(
    scores: Sequence[float] | np.ndarray,
    *,
    images: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Mean of `scores` and its percentile interval over resampled images.

    The difference of two models is an interval of its own: pass the differences of their scores, image by image.

    Args:
        scores: [N], finite.
        images: [N], what each score is of, where one image has several: as its questions are not independent, all
            scores of an image are drawn together. None: every score is of an image of its own.
        confidence: the share of resampled means inside.
    Returns: the mean and its bounds; all three are the same for one image.
    Raises: ValueError for scores that are not finite or not one per image, or a confidence outside (0, 1).
    """
    scores = np.asarray(scores, np.float64)
    checks.one_score_per_row("bootstrap_interval", "scores", scores)
    checks.finite_scores("bootstrap_interval", "scores", scores)
    checks.open_share("bootstrap_interval", "confidence", confidence)
    checks.size("bootstrap_interval", "resamples", resamples)
    sums, counts = scores, np.ones(len(scores))
    if images is not None:
        checks.as_long("bootstrap_interval", "images", images, "scores", scores)
        numbers: dict[Hashable, int] = {}
        owner = [numbers.setdefault(image, len(numbers)) for image in images]
        sums, counts = np.bincount(owner, scores), np.bincount(owner).astype(np.float64)

    generator = np.random.default_rng(seed)
    means = []
    step = max(1, _CHUNK // len(sums))
    for start in range(0, resamples, step):
        drawn = generator.integers(len(sums), size=(min(step, resamples - start), len(sums)))
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Interval(float(scores.mean()), float(low), float(high))
