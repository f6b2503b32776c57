"""What several ops ask of their arguments: kinds, dtypes, shapes, devices, numbers."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def invalid(
    op: str, argument: str, contract: str, found: str, remedy: str = "", kind: type[Exception] = ValueError
) -> Exception:
    return kind(f"{op}: {argument} must {contract}; got {found}" + (f"; {remedy}" if remedy else ""))


def shape_of(x: Tensor) -> str:
    return f"shape {tuple(x.shape)}"


def kind_of(x: Any) -> str:
    return str(x.dtype) if isinstance(x, Tensor) else type(x).__name__


def dense(op: str, name: str, x: Tensor, shape: str) -> None:
    if not isinstance(x, Tensor):
        raise invalid(op, name, f"be a tensor {shape}", kind_of(x), "convert it: torch.as_tensor", kind=TypeError)
    if x.is_nested or x.layout != torch.strided:
        found = "a nested tensor" if x.is_nested else str(x.layout)
        raise invalid(op, name, f"be a dense tensor {shape}", found, "convert it, as by to_dense()", kind=TypeError)


def floating(op: str, name: str, x: Tensor) -> None:
    if x.dtype not in FLOATS:
        remedy = f"convert it: {name}.float()"
        raise invalid(op, name, "be fp16, bf16, fp32 or fp64", kind_of(x), remedy, kind=TypeError)


def rank(op: str, name: str, x: Tensor, shape: str, remedy: str = "") -> None:
    if x.ndim != shape.count(",") + 1:
        raise invalid(op, name, f"be {shape}", shape_of(x), remedy)


def matrix(op: str, name: str, x: Tensor, shape: str) -> None:
    """A dense floating-point matrix with at least one row and one column."""
    dense(op, name, x, shape)
    floating(op, name, x)
    rank(op, name, x, shape, f"reshape it: {name}.reshape(-1, D)")
    if x.shape[0] == 0 or x.shape[1] == 0:
        raise invalid(op, name, f"be {shape} with at least one row and one feature", shape_of(x), "skip empty batches")


def has_data(op: str, name: str, x: Tensor) -> None:
    if x.is_meta:
        remedy = "materialise it, or trace shapes with torch.compile or FakeTensorMode"
        raise invalid(op, name, "hold data", "a tensor on meta", remedy)


def same_dtype(op: str, name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    if x.dtype != like.dtype:
        remedy = f"convert one: {name}.to({like_name}.dtype), or call under torch.autocast"
        raise invalid(op, name, f"have the dtype of {like_name}, {like.dtype}", kind_of(x), remedy, kind=TypeError)


def same_device(op: str, name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    if x.device != like.device:
        remedy = f"move it: {name}.to({like_name}.device)"
        raise invalid(op, name, f"be on the device of {like_name}, {like.device}", str(x.device), remedy)


def number(op: str, name: str, x: float | Tensor, dtype: torch.dtype) -> None:
    """A real number (Python's, NumPy's or a 0-d array) within `dtype`, or a floating-point tensor with one element."""
    if isinstance(x, Tensor):
        if not x.is_floating_point():
            raise invalid(op, name, "be floating point", kind_of(x), f"convert it: {name}.float()", kind=TypeError)
        if x.numel() != 1:
            remedy = "one value serves all logits"
            raise invalid(op, name, "be a number or a tensor with one element", shape_of(x), remedy)
    elif not (_is_real(x) or (isinstance(x, np.ndarray) and x.ndim == 0 and _is_real(x[()]))):
        remedy = f"convert it: float({name})"
        raise invalid(op, name, "be a number or a tensor with one element", kind_of(x), remedy, kind=TypeError)
    elif torch.finfo(dtype).max < abs(x) != math.inf:
        raise invalid(op, name, f"lie within {dtype}", reprlib.repr(x), "scale it down")


def _is_real(x: Any) -> bool:
    return isinstance(x, (int, float, Real))  # the builtins first: isinstance asks an ABC slowly


def real(op: str, name: str, x: Any) -> None:
    if not _is_real(x):
        raise invalid(op, name, "be a number", kind_of(x), f"convert it: float({name})", kind=TypeError)


def flag(op: str, name: str, x: Any) -> None:
    if not isinstance(x, bool):
        raise invalid(op, name, "be True or False", repr(x), "pass a bool", kind=TypeError)


def vector(op: str, name: str, x: Tensor, length: int, letter: str, like_name: str, like: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise invalid(op, name, f"be a tensor [{letter}]", kind_of(x), "convert it: torch.as_tensor", kind=TypeError)
    if x.ndim != 1 or x.shape[0] != length:
        owner = {"N": "image", "M": "text", "E": "weight", "V": "embedding"}[letter]
        raise invalid(op, name, f"be [{letter}] with {letter} = {length}", shape_of(x), f"one value per row of {owner}")
    same_device(op, name, x, like_name, like)


def integer(op: str, name: str, x: Tensor) -> None:
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise invalid(op, name, "be an integer tensor", kind_of(x), f"convert it: {name}.long()", kind=TypeError)


def choice(op: str, name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise invalid(op, name, f"be one of {', '.join(map(repr, choices))}", repr(value))


def finite(op: str, name: str, value: float) -> None:
    if not math.isfinite(value):
        raise invalid(op, name, "be finite", repr(value))


def seed(op: str, name: str, value: Any) -> None:
    """What torch.manual_seed takes."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 64:
        raise invalid(op, name, "be a whole number of at least 0, below 2^64", repr(value))


def not_negative(op: str, name: str, value: float) -> None:
    real(op, name, value)
    if not value >= 0:
        raise invalid(op, name, "not be negative", repr(value), "0 turns it off")
