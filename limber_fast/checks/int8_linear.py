"""What int8_linear and its weights ask of their arguments, and of the files that hold one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from limber_fast.checks.general import (
    FLOATS,
    dense,
    floating,
    has_data,
    invalid,
    kind_of,
    same_device,
    same_dtype,
    shape_of,
)


def float_matrices(op: str, found: Any) -> None:
    """A weight to quantise, or several to be stacked."""
    if not isinstance(found, (tuple, list)) or not found:
        remedy = "convert it: torch.as_tensor"
        raise invalid(op, "weight", "be a tensor [N, K] or a sequence of them", kind_of(found), remedy, kind=TypeError)
    for x in found:
        dense(op, "weight", x, "[N, K]")
        floating(op, "weight", x)
        if x.ndim != 2 or 0 in x.shape or x.shape[1] != found[0].shape[1]:
            width = "" if x is found[0] else f" with the K = {found[0].shape[1]} of the first"
            raise invalid(op, "weight", f"be [N, K]{width}, N and K of at least 1", shape_of(x))
        has_data(op, "weight", x)
        same_device(op, "weight", x, "the first", found[0])


def finite_weight(op: str, absmax: Tensor, row: int) -> None:
    if not absmax.isfinite().all():
        row += int((~absmax.isfinite()).nonzero()[0])
        raise invalid(op, "weight", "be finite", f"NaN or Inf in row {row}", "an int8 value has no place for it")


def int8_operands(op: str, x: Any, weight: Any, shape: tuple[int, int]) -> None:
    dense(op, "x", x, "[..., K]")
    floating(op, "x", x)
    has_data(op, "x", x)
    if x.ndim == 0 or x.shape[-1] != shape[1]:
        raise invalid(op, "x", f"be [..., K] with the K = {shape[1]} of weight", shape_of(x))
    same_device(op, "x", x, "weight", weight.packed)


def int8_weight(op: str, weight: Any, kind: type) -> None:
    if not isinstance(weight, kind):
        remedy = "make one: limber_fast.quantize_int8(weight)"
        raise invalid(op, "weight", "be an Int8Weight", kind_of(weight), remedy, kind=TypeError)


def frozen_bias(op: str, bias: Any, n: int, x: Tensor, name: str = "x", letter: str = "N") -> None:
    dense(op, "bias", bias, f"[{letter}]")
    floating(op, "bias", bias)
    if bias.shape != (n,):
        raise invalid(op, "bias", f"be [{letter}] with the {letter} = {n} of weight", shape_of(bias))
    same_device(op, "bias", bias, name, x)
    if torch.is_grad_enabled() and bias.requires_grad:
        remedy = "no gradient reaches it: detach it, or add a trained bias to the result"
        raise invalid(op, "bias", "be frozen", "a tensor that requires grad", remedy)


def residual_stream(op: str, residual: Any, n: int, x: Tensor) -> None:
    dense(op, "residual", residual, "[..., N]")
    floating(op, "residual", residual)
    if residual.shape != (*x.shape[:-1], n):
        raise invalid(op, "residual", f"be {(*x.shape[:-1], n)}, the shape of the result", shape_of(residual))
    same_dtype(op, "residual", residual, "x", x)
    same_device(op, "residual", residual, "x", x)


def stored_tensor(op: str, name: str, found: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    expected = f"be {str(dtype).removeprefix('torch.')} {shape}"
    if found is None:
        raise invalid(op, f"tensor {name!r}", expected, "no tensor of that name")
    if found.dtype != dtype or found.shape != shape:
        raise invalid(op, f"tensor {name!r}", expected, f"{kind_of(found)} {shape_of(found)}")


def stored_layout(op: str, found: Any, version: int) -> None:
    if found != version:
        remedy = "quantise the weight again"
        raise invalid(op, "the layout", f"be version {version}", f"version {found!r}", remedy)


def supported_compute(op: str, x: Tensor, compute: str) -> None:
    if compute == "w8a8" and x.dtype not in FLOATS[:3]:
        remedy = "convert it: x.float()"
        raise invalid(op, "x", "be fp16, bf16 or fp32 with compute='w8a8'", kind_of(x), remedy, kind=TypeError)
