"""int8_linear and its quantisation in plain, differentiable PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """q [N, K] int8 and scales [N] fp32 of `limber_fast.quantize_int8`, channel by channel."""
    rows, scales = [], []
    for channel in weight.double() if weight.dtype == torch.float64 else weight.float():
        scale = (channel.abs().max() / 127).float()
        rows.append((channel / scale if scale else 0 * channel).round().clamp(-127, 127))
        scales.append(scale)
    return torch.stack(rows).to(torch.int8), torch.stack(scales)


def gelu_new(z: Tensor) -> Tensor:
    return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def round_to_8_bits(x: Tensor, outlier_threshold: float = 6.0) -> Tensor:
    """x as w8a8 sees it: step (u - zero) below the threshold, itself from there on. The integers come about in fp32,
    one rounding per operation, so that every backend finds the same ones."""
    row = x.float()
    keep = ~(row.abs() < (outlier_threshold or math.inf))
    inlier = row.masked_fill(keep, 0)
    low, high = inlier.amin(-1, keepdim=True).clamp(max=0), inlier.amax(-1, keepdim=True).clamp(min=0)
    step = high / 255 - low / 255
    inverse = torch.where(step >= torch.finfo(torch.float32).tiny, 1 / step, 0)
    zero = (-low * inverse).round()
    u = ((inlier * inverse).round() + zero).clamp(0, 255)
    return torch.where(keep, x, (step.double() * (u - zero).double()).to(x.dtype))


def int8_linear(
    x: Tensor,
    q: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    compute: str = "w8a16",
    outlier_threshold: float = 6.0,
) -> Tensor:
    """The formula of `limber_fast.int8_linear` in the dtype of `x`; w8a8's rounding has the identity's gradient."""
    if compute == "w8a8":
        x = x + (round_to_8_bits(x.detach(), outlier_threshold) - x.detach())
    y = (x @ q.to(x.dtype).T) * scales.to(x.dtype)
    if bias is not None:
        y = y + bias.to(x.dtype)
    if activation == "gelu_new":
        y = gelu_new(y)
    return y if residual is None else y + residual
