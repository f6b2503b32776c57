"""What info_nce and the losses over it ask of their arguments."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from limber_fast.checks.general import invalid, kind_of, real, same_device, same_dtype, shape_of


def same_features(op: str, name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """`x` has the width, dtype and device of `like`."""
    if x.shape[1] != like.shape[1]:
        remedy = "project both to one width"
        raise invalid(op, name, f"have the D = {like.shape[1]} of {like_name}", shape_of(x), remedy)
    same_dtype(op, name, x, like_name, like)
    same_device(op, name, x, like_name, like)


def constant_weights(op: str, weights: Tensor) -> None:
    if not weights.is_floating_point():
        remedy = "convert it: weights.float()"
        raise invalid(op, "weights", "be floating point", kind_of(weights), remedy, kind=TypeError)
    if weights.requires_grad:
        raise invalid(op, "weights", "be constants", "a tensor that requires grad", "detach it: weights.detach()")


def label_smoothing(op: str, value: float, variant: str) -> None:
    real(op, "label_smoothing", value)
    if not 0 <= value < 1:
        raise invalid(op, "label_smoothing", "lie in [0, 1)", repr(value), "0 turns it off")
    if value and variant == "sigmoid":
        raise invalid(op, "label_smoothing", "be 0 with variant='sigmoid', which has no softmax to smooth", repr(value))


def square(op: str, n: int, m: int) -> None:
    if n != m:
        found = f"image with N = {n} rows and text with M = {m}"
        raise invalid(op, "labels", "be given where N and M differ", found, "pass labels=[N] and symmetric=False")


def symmetric_rectangle(op: str, n: int, m: int) -> None:
    if n != m:
        remedy = "text rows without a positive have no loss: pass symmetric=False"
        raise invalid(op, "symmetric", "be False where N and M differ", f"True with N = {n}, M = {m}", remedy)


def label_range(op: str, low: int, high: int, m: int) -> None:
    if low < 0 or high >= m:
        found = f"values from {low} to {high}"
        raise invalid(op, "labels", f"lie in [0, M) with M = {m}", found, "they index rows of text")


def permutation(op: str, is_permutation: bool) -> None:
    if not is_permutation:
        remedy = "pass symmetric=False for the image-to-text loss alone"
        raise invalid(op, "labels", "be a permutation where symmetric=True", "repeated values", remedy)


def id_pair(op: str, ids: Any) -> None:
    if not (isinstance(ids, (tuple, list)) and len(ids) == 2):
        found = f"{len(ids)} of them" if isinstance(ids, (tuple, list)) else kind_of(ids)
        raise invalid(op, "ids", "be a tensor [N] or a pair (image_ids [N], text_ids [M])", found, kind=TypeError)


def shared_ids(op: str, n: int, m: int) -> None:
    if n != m:
        remedy = "pass a pair (image_ids [N], text_ids [M])"
        raise invalid(op, "ids", "be a pair where N and M differ", f"one tensor with N = {n}, M = {m}", remedy)


def single_process(op: str, found: dict[str, Any]) -> None:
    """Constructor arguments of a distributed loss that this class does not take on."""
    if found:
        given = ", ".join(f"{name}={value!r}" for name, value in found.items())
        raise invalid(op, "the loss", "be built for one process (world_size=1, rank=0)", given)
