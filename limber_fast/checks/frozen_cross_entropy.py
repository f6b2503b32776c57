"""What frozen_cross_entropy asks of its arguments."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from limber_fast.checks.general import dense, floating, has_data, integer, invalid, same_device, shape_of


def hidden_rows(op: str, hidden: Any, features: int, packed: Tensor) -> None:
    dense(op, "hidden", hidden, "[..., D]")
    floating(op, "hidden", hidden)
    has_data(op, "hidden", hidden)
    if hidden.ndim == 0 or hidden.shape[-1] != features:
        raise invalid(op, "hidden", f"be [..., D] with the D = {features} of weight", shape_of(hidden))
    same_device(op, "hidden", hidden, "weight", packed)


def row_labels(op: str, labels: Any, hidden: Tensor) -> None:
    dense(op, "labels", labels, "[...]")
    integer(op, "labels", labels)
    if labels.shape != hidden.shape[:-1]:
        raise invalid(op, "labels", f"be {tuple(hidden.shape[:-1])}, one per row of hidden", shape_of(labels))
    same_device(op, "labels", labels, "hidden", hidden)


def vocabulary_labels(op: str, labels: Tensor, ignore_index: int, vocabulary: int) -> None:
    outside = labels[((labels < 0) | (labels >= vocabulary)) & (labels != ignore_index)]
    if len(outside):
        contract = f"lie in [0, V) with V = {vocabulary}, or be ignore_index = {ignore_index}"
        raise invalid(op, "labels", contract, f"{int(outside[0])}", "they name rows of weight")
