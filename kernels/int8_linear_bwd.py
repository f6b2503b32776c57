"""Backward of int8_linear: dX = (dY gelu_new' s) q, the scales folded into dY; the weight is widened tile by tile.

The gradient is also what frozen_cross_entropy adds up chunk by chunk of the vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl

from limber_fast.kernels.common import descriptor, grouped_order
from limber_fast.kernels.int8_linear import GELU_CUBE, GELU_RATE, add_products

GELU_SLOPE = tl.constexpr(2 * 0.7978845608028654)  # 2 sqrt(2 / pi)


@triton.jit
def scaled_gradient(grad, preactivation, scales, line, kept, n, N, HAS_GELU: tl.constexpr):
    """dY gelu_new'(z) s of one row, fp32; zeros past the end."""
    g = tl.load(grad + line + n, mask=n < N, other=0.0).to(tl.float32)
    if HAS_GELU:
        z = tl.load(preactivation + kept + n, mask=n < N, other=0.0).to(tl.float32)
        z = tl.where(z > 20.0, 20.0, tl.where(z < -20.0, -20.0, z))  # beyond them it is 0 and 1, and NaN stays
        square = z * z * GELU_CUBE
        p = 1.0 / (1.0 + tl.exp2((z + z * square) * GELU_RATE))
        g *= p + z * p * (1.0 - p) * (1.0 + 3.0 * square) * GELU_SLOPE
    return g * tl.load(scales + n, mask=n < N, other=0.0)


@triton.jit
def int8_linear_grad_kernel(
    grad, preactivation, scales, g, factor, N, padded, grad_stride, HAS_GELU: tl.constexpr, BLOCK: tl.constexpr
):
    """Row by row g [M, padded] = dY gelu_new'(z) s / factor[row]: a power of 2 that keeps it in range, or in bf16 1."""
    row = tl.program_id(0).to(tl.int64)
    by, inverse = 1.0, 1.0
    if g.dtype.element_ty != tl.bfloat16:  # fp32 goes in three pieces, the least of which 2^-16 further down
        top = tl.zeros((BLOCK,), tl.float32)
        for n0 in range(0, N, BLOCK):
            n = n0 + tl.arange(0, BLOCK)
            value = tl.abs(scaled_gradient(grad, preactivation, scales, row * grad_stride, row * N, n, N, HAS_GELU))
            top = tl.maximum(top, tl.where(value < float("inf"), value, 0.0))
        exponent = tl.max(top, 0).to(tl.int32, bitcast=True) & 0x7F800000
        # Between 2^-126 and 2^126: its inverse is a normal number as well.
        exponent = tl.where(exponent == 0, 0x3F800000, tl.minimum(exponent, 0x7E800000))
        by = exponent.to(tl.float32, bitcast=True)
        inverse = (0x7F000000 - exponent).to(tl.float32, bitcast=True)
    tl.store(factor + row, by)
    for n0 in range(0, padded, BLOCK):
        n = n0 + tl.arange(0, BLOCK)
        value = scaled_gradient(grad, preactivation, scales, row * grad_stride, row * N, n, N, HAS_GELU) * inverse
        tl.store(g + row * padded + n, value.to(g.dtype.element_ty), mask=n < padded)


@triton.jit
def store_gradient(acc, m, k, factor, out, M, K, HAS_OLD: tl.constexpr):
    """out = acc factor[m], or with HAS_OLD acc + out factor[m]."""
    mask = (m < M)[:, None] & (k < K)[None, :]
    at = m.to(tl.int64)[:, None] * K + k[None, :]
    by = tl.load(factor + m, mask=m < M, other=0.0)[:, None]
    if HAS_OLD:
        acc += tl.load(out + at, mask=mask, other=0.0) * by
    else:
        acc *= by
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["blocks"])
def int8_linear_bwd_kernel(
    g, w, factor, out, part, M, N, K, g_stride, w_stride, num_m, num_n, blocks, splits, HAS_OLD: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr, MAGIC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out [M, K] of g [M, N] and w [N, K]: program (tile, s) owns BLOCK_M tokens x BLOCK_N features, and every block
    of BLOCK_K output channels whose number is s modulo splits. SPLIT: the sums go to part [splits, M, K]."""
    pm, pn = grouped_order(tl.program_id(0), num_m, num_n, GROUP)
    m0, k0 = pm * BLOCK_M, pn * BLOCK_N
    rm, rk, rn = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    tl.assume(tl.program_id(1) < blocks)  # without it zeros are kept for a loop that has no trip
    if TMA:
        gd = descriptor(g, M, g_stride, g_stride, BLOCK_M, BLOCK_K, TMA)
        wd = descriptor(w, N, w_stride, w_stride, BLOCK_K, BLOCK_N, TMA)
        for block in tl.range(tl.program_id(1), blocks, splits, num_stages=STAGES):
            n = block * BLOCK_K
            acc = add_products(wd.load([n, k0]), gd.load([m0, n]), acc, False, MAGIC)
    else:
        pg = g + m0.to(tl.int64) * g_stride + (rm[:, None] * g_stride + rn[None, :])
        pw = w + k0 + (rn[:, None] * w_stride + rk[None, :])
        row_mask, feature_mask = (rm < M - m0)[:, None], (rk < w_stride - k0)[None, :]
        for block in tl.range(tl.program_id(1), blocks, splits, num_stages=STAGES):
            n = block * BLOCK_K
            gt = tl.load(pg + n, mask=row_mask, other=0.0)
            wt = tl.load(pw + tl.cast(n, tl.int64) * w_stride, mask=(rn < N - n)[:, None] & feature_mask, other=0)
            acc = add_products(wt, gt, acc, False, MAGIC)
    m, k = m0 + rm, k0 + rk
    if SPLIT:
        at = (tl.program_id(1).to(tl.int64) * M + m)[:, None] * K + k[None, :]
        tl.store(part + at, acc, mask=(m < M)[:, None] & (k < K)[None, :])
    else:
        store_gradient(acc, m, k, factor, out, M, K, HAS_OLD)


@triton.jit
def int8_linear_bwd_finish_kernel(
    part, factor, out, splits, M, K, num_m, HAS_OLD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Adds up part [splits, M, K] in order."""
    m = tl.program_id(0) % num_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) // num_m * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (m < M)[:, None] & (k < K)[None, :]
    at = m.to(tl.int64)[:, None] * K + k[None, :]
    acc = tl.load(part + at, mask=mask, other=0.0)
    for s in range(1, splits):
        acc += tl.load(part + tl.cast(s, tl.int64) * M * K + at, mask=mask, other=0.0)
    store_gradient(acc, m, k, factor, out, M, K, HAS_OLD)
