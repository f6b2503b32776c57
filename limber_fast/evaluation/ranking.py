"""Top-k accuracy that cannot flatter: scores must be finite, and a tie counts against the right class."""

from __future__ import annotations

import torch
from torch import Tensor

from limber_fast import checks


def ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """Rank of the right class, 0 for the best: how many other classes score at least as high.

    Args:
        scores: [N, C], higher is better; -inf marks a class that is out of the question.
        labels: [N] int64, the right class.
    Returns: [N] int64.
    Raises: ValueError for NaN or +inf anywhere, or -inf at a right class: an evaluator that ranks them prints 100%.
    """
    right = scores.gather(1, labels[:, None])
    if bool(torch.isnan(scores).any() | torch.isposinf(scores).any()) or not bool(torch.isfinite(right).all()):
        raise ValueError("ranks: scores must not be NaN or +inf, and the right class needs a finite score")
    return (scores >= right).sum(1) - 1


def top_k(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent, with the number of test images and of classes."""
    if len(labels) == 0:
        raise checks.invalid("top_k", "labels", "hold at least one image", "none")
    found = ranks(scores, labels)
    percent = {f"top{k}": 100 * float((found < k).float().mean()) for k in (1, 5)}
    return {**percent, "images": len(labels), "classes": scores.shape[1]}


def chance(classes: int) -> dict[str, float]:
    """Expected accuracy of guessing, in percent."""
    return {f"top{k}": 100 * min(k / classes, 1.0) for k in (1, 5)}
