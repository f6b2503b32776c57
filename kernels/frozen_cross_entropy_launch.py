"""Launchers of the frozen_cross_entropy kernels; the products around them are int8_linear's."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from limber_fast.kernels import frozen_cross_entropy as kernels
from limber_fast.kernels.int8_linear_launch import ROW_BLOCK, Weight, int8_linear_bwd, int8_linear_fwd

# Logits that are held at a time: 16 MiB in fp32, which stay in the L2 cache of every chip here between the product that
# writes them and the two sweeps that read them.
HELD = 4 << 20
# What the largest product of exponential and scale is lifted to, as a power of 2: fp16 then holds all that fp32 sums of
# probabilities show, e^-26 of the largest and more.
LIFTED = 14


def chunk_of(rows: int, vocabulary: int) -> int:
    """Tokens of the vocabulary whose logits are held together, for so many labelled rows."""
    chunks = triton.cdiv(vocabulary, max(512, HELD // rows))
    return min(vocabulary, triton.cdiv(triton.cdiv(vocabulary, chunks), 512) * 512)  # nearly even ones


def _row(length: int) -> dict[str, int]:
    block = min(ROW_BLOCK, max(64, triton.next_power_of_2(length)))
    return {"BLOCK": block, "num_warps": max(1, block // 512)}


def frozen_cross_entropy_fwd(
    x: Tensor, weight: Weight, bias: Tensor | None, labels: Tensor, rows: Tensor, losses: Tensor,
    gradient: Tensor | None,
) -> None:  # fmt: skip
    """Writes losses[rows] and gradient[rows] of x [R, D], whose labels are [R]; rows and labels int64, R > 0."""
    r, d = x.shape
    v = len(weight.scales)
    chunk = chunk_of(r, v)
    has_grad = gradient is not None
    state, factor = x.new_empty(3, r, dtype=torch.float32), x.new_empty(r, dtype=torch.float32)
    z = x.new_empty(r * chunk, dtype=torch.float32)
    g = x.new_empty(r * (triton.cdiv(chunk, 64) * 64 if has_grad else 0))
    sums = x.new_empty(r, d, dtype=torch.float32) if has_grad else state
    exponent = torch.frexp(weight.scales.max()).exponent.clamp(min=-100)
    lift = torch.ldexp(torch.ones_like(factor[:1]), LIFTED - exponent)
    for first in range(0, v, chunk):
        last = min(v, first + chunk)
        part, size, padded = weight.part(first, last), last - first, triton.cdiv(last - first, 64) * 64
        logits, weighted = z[: r * size].view(r, size), g[: r * padded].view(r, -1) if has_grad else z
        int8_linear_fwd(x, part, None if bias is None else bias[first:last], None, logits, None, gelu=False)
        kernels.frozen_cross_entropy_chunk_kernel[(r,)](
            logits, labels, part.scales, lift, state, weighted, factor, first, r, size, padded, FIRST=first == 0,
            HAS_GRAD=has_grad, **_row(padded),
        )  # fmt: skip
        if has_grad:
            int8_linear_bwd(weighted, factor, part, sums, accumulate=first > 0)
    kernels.frozen_cross_entropy_finish_kernel[(r,)](
        state, sums, rows, labels, weight.rows, weight.scales, lift, losses, gradient if has_grad else losses, r, d,
        weight.rows.stride(0), HAS_GRAD=has_grad, **_row(d),
    )  # fmt: skip


def frozen_cross_entropy_bwd(
    d_losses: Tensor, gradient: Tensor, labels: Tensor, d_hidden: Tensor, *, ignore_index: int
) -> None:
    """Fills d_hidden; everything contiguous, M > 0."""
    m, d = gradient.shape
    kernels.frozen_cross_entropy_bwd_kernel[(m,)](d_losses, gradient, labels, d_hidden, ignore_index, d, **_row(d))
