"""int8_linear with the integers as a dense matrix, which bf16 holds exactly: bf16 for bf16 activations, else wide."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from limber_fast.backends.eager.operands import wide
from limber_fast.ops.int8_weight import to_rows


def int8_linear_supports(request: Any) -> None:
    return None


def integers(packed: Tensor, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """[n, k]: the rows of a GPU's layout, or back from blocks of 32 channels and groups of 4."""
    return (packed if packed.ndim == 2 else to_rows(packed, n))[:, :k].to(dtype)


def _rounded(x: Tensor, outlier_threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """x = step * integers + outliers: fp32 step [M, 1], integers and outliers [M, K]."""
    outlier = ~(x.abs() < outlier_threshold)
    inlier = x.masked_fill(outlier, 0)
    low, high = inlier.amin(1, keepdim=True).clamp_max(0), inlier.amax(1, keepdim=True).clamp_min(0)
    step = high / 255 - low / 255
    inverse = torch.where(step >= torch.finfo(torch.float32).tiny, 1 / step, 0)
    zero = (-low * inverse).round()
    return step, (inlier * inverse).round().add_(zero).clamp_(0, 255).sub_(zero), x.masked_fill(~outlier, 0)


def _multiplied(x: Tensor, q: Tensor, compute: str, outlier_threshold: float) -> Tensor:
    """x q^T, wide."""
    if compute == "w8a16":
        return wide(dense_product(x, q))
    step, u, outliers = _rounded(x.float(), outlier_threshold)
    y = step * dense_product(u, q)
    return y + dense_product(outliers, q) if outliers.any() else y


def dense_product(x: Tensor, q: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):  # fp16 would overflow
        return F.linear(x, q)


def int8_linear_fwd(
    x: Tensor, packed: Tensor, scales: Tensor, row_sums: Tensor, bias: Tensor | None, residual: Tensor | None, *,
    activation: str | None, compute: str, outlier_threshold: float, keep: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 and compute == "w8a16" else wide(x[:0]).dtype
    y = _multiplied(x.to(dtype), integers(packed, len(scales), x.shape[1], dtype), compute, outlier_threshold)
    y = y * scales if bias is None else torch.addcmul(bias, y, scales.to(y.dtype))
    kept = y.to(x.dtype) if keep else None
    if activation is not None:
        y = F.gelu(y, approximate="tanh")
    return (y if residual is None else y + residual).to(x.dtype), kept


def int8_linear_bwd(
    grad: Tensor, packed: Tensor, scales: Tensor, column_sums: Tensor, preactivation: Tensor | None
) -> Tensor:
    g = wide(grad)
    if preactivation is not None:
        g = torch.ops.aten.gelu_backward(g, wide(preactivation), approximate="tanh")
    dtype = torch.bfloat16 if grad.dtype == torch.bfloat16 else g.dtype
    q = integers(packed, len(scales), len(column_sums), dtype)
    return dense_product((g * scales).to(dtype), q.T).to(grad.dtype)
