"""Exact match: the strictest of the scores, which no template word inflates."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from limber_fast import checks
from limber_fast.evaluation.vqa import normalize_answer


def exact_match(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    normalize: Callable[[str], str] = normalize_answer,
) -> np.ndarray:
    """1 where a prediction equals one of its references, both normalised, else 0.

    A prediction of which nothing is left is wrong, even where nothing is left of a reference.

    Args:
        predictions: one per image or question. references: per prediction at least one.
        normalize: applied to both; VQA's official normalisation by default.
    Returns: [N] fp64.
    """
    checks.texts("exact_match", "predictions", predictions)
    checks.text_sets("exact_match", "references", references, "predictions", predictions)
    pairs = zip(map(normalize, predictions), references, strict=True)
    return np.array([float(bool(found) and found in map(normalize, texts)) for found, texts in pairs])
