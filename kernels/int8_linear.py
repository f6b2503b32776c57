"""int8_linear: activations times a frozen int8 weight that is read once, as bytes, and never dequantised whole.

Tiles are transposed, [channels, tokens]: the weight is the left operand of the tensor cores and is widened in registers
(w8a16) or not at all (w8a8); one token fills as little as it can. Sums: int32 for w8a8, exactly; fp32 for 16-bit
activations; fp32 activations are three bf16 pieces, which hold all their bits, and fp32 sums.

A reduction is split over programs where tiles are few. Their sums are added up in order by a second kernel: no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from limber_fast.kernels.common import descriptor, grouped_order

# v + ROUNDER - ROUNDER is v to the nearest integer, ties to even, for |v| < 2^22.
ROUNDER = tl.constexpr(12582912.0)
GELU_CUBE = tl.constexpr(0.044715)
GELU_RATE = tl.constexpr(-2 * 0.7978845608028654 * 1.4426950408889634)  # -2 sqrt(2 / pi) log2(e)


@triton.jit
def weight_values(w, dtype: tl.constexpr, MAGIC: tl.constexpr):
    """An int8 tile as floats. MAGIC: as the mantissa of 2^23 + 128 + q; the conversion instruction of sm_80 takes as
    long as the products do."""
    if MAGIC:
        bits = (w.to(tl.uint8, bitcast=True) ^ 128).to(tl.uint32) | 0x4B000000
        return (bits.to(tl.float32, bitcast=True) - 8388736.0).to(dtype)
    else:
        return w.to(dtype)


@triton.jit
def upper_bits(x):
    """(x with the mantissa of bf16, what that leaves out); of infinity nothing is left, of NaN NaN."""
    high = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return high.to(tl.bfloat16), tl.where(tl.abs(x) == float("inf"), 0.0, x - high)


@triton.jit
def add_products(w, x, acc, WEIGHT_FIRST: tl.constexpr, MAGIC: tl.constexpr):
    """acc + w x (or x w) of an int8 tile of the weight and activations in int8, bf16, fp16 or fp32."""
    if x.dtype == tl.int8:
        acc = tl.dot(w, x, acc, out_dtype=tl.int32)
    elif x.dtype == tl.float32:
        v = weight_values(w, tl.bfloat16, MAGIC)
        high, rest = upper_bits(x)
        middle, rest = upper_bits(rest)
        low = rest.to(tl.bfloat16)
        if WEIGHT_FIRST:
            acc = tl.dot(v, high, tl.dot(v, middle, tl.dot(v, low, acc)))
        else:
            acc = tl.dot(high, v, tl.dot(middle, v, tl.dot(low, v, acc)))
    else:
        v = weight_values(w, x.dtype, MAGIC)
        acc = tl.dot(v, x, acc) if WEIGHT_FIRST else tl.dot(x, v, acc)
    return acc


@triton.jit
def add_outliers(
    y, n, m, w, source, outliers, M, N, w_stride, source_stride, threshold, BLOCK: tl.constexpr, MAGIC: tl.constexpr
):
    """y + the products of the activations from the threshold on, in the columns that `outliers` lists, by BLOCK."""
    count = tl.load(outliers)
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        column = tl.load(outliers + 1 + at, mask=at < count, other=0)
        v = tl.load(
            w + n.to(tl.int64)[:, None] * w_stride + column[None, :], mask=(n < N)[:, None] & (at < count)[None, :],
            other=0,
        )  # fmt: skip
        x = tl.load(
            source + m.to(tl.int64)[None, :] * source_stride + column[:, None],
            mask=(m < M)[None, :] & (at < count)[:, None], other=0.0,
        )  # fmt: skip
        x = tl.where(tl.abs(x.to(tl.float32)) < threshold, tl.zeros_like(x), x)
        y = add_products(v, x, y, True, MAGIC)
    return y


@triton.jit
def finish_tile(
    acc, n, m, w, scales, row_sums, rounding, source, outliers, bias, residual, out, kept, M, N, w_stride,
    source_stride, residual_stride, threshold, W8A8: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GELU: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_KEPT: tl.constexpr, OUTLIERS: tl.constexpr, MAGIC: tl.constexpr,
):  # fmt: skip
    """The epilogue of sums [channels n, tokens m], and their store to out [M, N]; kept: what goes into gelu_new."""
    mask = (n < N)[:, None] & (m < M)[None, :]
    if W8A8:
        step = tl.load(rounding + m, mask=m < M, other=0.0)
        zero = tl.load(rounding + M + m, mask=m < M, other=0.0).to(tl.int32)
        acc += (128 - zero)[None, :] * tl.load(row_sums + n, mask=n < N, other=0)[:, None]
        y = add_outliers(
            acc.to(tl.float32) * step[None, :], n, m, w, source, outliers, M, N, w_stride, source_stride, threshold,
            OUTLIERS, MAGIC,
        )  # fmt: skip
    else:
        y = acc
    y *= tl.load(scales + n, mask=n < N, other=0.0)[:, None]
    if HAS_BIAS:
        y += tl.load(bias + n, mask=n < N, other=0.0)[:, None]
    at = m.to(tl.int64)[None, :] * N + n[:, None]
    if HAS_KEPT:
        tl.store(kept + at, y.to(kept.dtype.element_ty), mask=mask)
    if HAS_GELU:  # z / 2 (1 + tanh u) = z / (1 + e^-2u)
        y = y / (1.0 + tl.exp2((y + y * y * y * GELU_CUBE) * GELU_RATE))
    if HAS_RESIDUAL:
        y += tl.load(residual + m.to(tl.int64)[None, :] * residual_stride + n[:, None], mask=mask, other=0.0).to(
            tl.float32
        )
    tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["blocks"])  # of a loop known to run once the sums begin too late for wgmma
def int8_linear_fwd_kernel(
    x, w, scales, row_sums, rounding, source, outliers, bias, residual, out, kept, part, M, N, K, x_stride, w_stride,
    source_stride, residual_stride, threshold, num_m, num_n, blocks, splits, W8A8: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_GELU: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_KEPT: tl.constexpr, OUTLIERS: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr, EVEN_K: tl.constexpr, MAGIC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (tile, s) owns a tile of num_m x num_n, and every block of the reduction whose number is s modulo splits.

    x [M, K]: the activations, or their integers less 128 (W8A8: rounding [2, M] has step and zero of each row).
    SPLIT: the sums go to part [splits, M, N] as they are, for `int8_linear_finish_kernel`.
    """
    pm, pn = grouped_order(tl.program_id(0), num_m, num_n, GROUP)
    m0, n0 = pm * BLOCK_M, pn * BLOCK_N
    rm, rn, rk = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32 if W8A8 else tl.float32)
    if TMA:
        xd = descriptor(x, M, K, x_stride, BLOCK_M, BLOCK_K, TMA)
        wd = descriptor(w, N, w_stride, w_stride, BLOCK_N, BLOCK_K, TMA)
        for block in tl.range(tl.program_id(1), blocks, splits, num_stages=STAGES):
            k = block * BLOCK_K
            acc = add_products(wd.load([n0, k]), xd.load([m0, k]).T, acc, True, MAGIC)
    else:
        # A 64-bit base and 32-bit offsets within the tile, as in common.dot_rows.
        px = x + m0.to(tl.int64) * x_stride + (rm[None, :] * x_stride + rk[:, None])
        pw = w + n0.to(tl.int64) * w_stride + (rn[:, None] * w_stride + rk[None, :])
        row_mask, channel_mask = (rm < M - m0)[None, :], (rn < N - n0)[:, None]
        for block in tl.range(tl.program_id(1), blocks, splits, num_stages=STAGES):
            k = block * BLOCK_K
            if EVEN_K:
                xt = tl.load(px + k, mask=row_mask, other=0.0)
                wt = tl.load(pw + k, mask=channel_mask, other=0)
            else:
                xt = tl.load(px + k, mask=row_mask & (rk < K - k)[:, None], other=0.0)
                wt = tl.load(pw + k, mask=channel_mask & (rk < K - k)[None, :], other=0)
            acc = add_products(wt, xt, acc, True, MAGIC)
    m, n = m0 + rm, n0 + rn
    if SPLIT:
        at = (tl.program_id(1).to(tl.int64) * M + m)[None, :] * N + n[:, None]
        tl.store(part + at, acc, mask=(n < N)[:, None] & (m < M)[None, :])
    else:
        finish_tile(
            acc, n, m, w, scales, row_sums, rounding, source, outliers, bias, residual, out, kept, M, N, w_stride,
            source_stride, residual_stride, threshold, W8A8, HAS_BIAS, HAS_GELU, HAS_RESIDUAL, HAS_KEPT, OUTLIERS,
            MAGIC,
        )  # fmt: skip


@triton.jit
def int8_linear_finish_kernel(
    part, w, scales, row_sums, rounding, source, outliers, bias, residual, out, kept, splits, M, N, w_stride,
    source_stride, residual_stride, threshold, num_m, num_n, W8A8: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_GELU: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_KEPT: tl.constexpr, OUTLIERS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MAGIC: tl.constexpr,
):  # fmt: skip
    """Adds up part [splits, M, N] in order, then the epilogue; a program owns a tile [BLOCK_N, BLOCK_M]."""
    m = tl.program_id(0) % num_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) // num_m * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (n < N)[:, None] & (m < M)[None, :]
    at = m.to(tl.int64)[None, :] * N + n[:, None]
    acc = tl.load(part + at, mask=mask, other=0)
    for s in range(1, splits):
        acc += tl.load(part + tl.cast(s, tl.int64) * M * N + at, mask=mask, other=0)
    finish_tile(
        acc, n, m, w, scales, row_sums, rounding, source, outliers, bias, residual, out, kept, M, N, w_stride,
        source_stride, residual_stride, threshold, W8A8, HAS_BIAS, HAS_GELU, HAS_RESIDUAL, HAS_KEPT, OUTLIERS, MAGIC,
    )  # fmt: skip


@triton.jit
def int8_linear_quantize_kernel(
    x, q, rounding, flags, M, K, padded, x_stride, threshold, BLOCK: tl.constexpr
):
    """Row by row u - 128 to q [M, padded], step and zero to rounding [2, M]; flags[k] = 1: column k has an outlier.

    x ~ step (u - zero) below the threshold, with one rounding per operation as on every backend: a product is an fma
    with 0, which the compiler does not contract with the sum behind it.
    """
    row = tl.program_id(0).to(tl.int64)
    low, high = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for k0 in range(0, K, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        v = tl.load(x + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
        inlier = tl.abs(v) < threshold
        tl.atomic_max(flags + k, 1, mask=(k < K) & (inlier == 0))
        v = tl.where(inlier, v, 0.0)
        low, high = tl.minimum(low, v), tl.maximum(high, v)
    low, high = tl.min(low, 0), tl.max(high, 0)
    step = tl.math.div_rn(high, 255.0) - tl.math.div_rn(low, 255.0)
    inverse = tl.where(step >= 1.1754943508222875e-38, tl.math.div_rn(1.0, step), 0.0)
    zero = tl.fma(-low, inverse, 0.0) + ROUNDER - ROUNDER
    tl.store(rounding + row, step)
    tl.store(rounding + M + row, zero)
    for k0 in range(0, padded, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        v = tl.load(x + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
        v = tl.where(tl.abs(v) < threshold, v, 0.0)
        u = tl.fma(v, tl.zeros_like(v) + inverse, tl.zeros_like(v)) + ROUNDER - ROUNDER + zero
        u = tl.minimum(tl.maximum(u, 0.0), 255.0) - 128.0
        tl.store(q + row * padded + k, u.to(tl.int32).to(tl.int8), mask=k < padded)


@triton.jit
def int8_linear_outliers_kernel(flags, outliers, K, BLOCK: tl.constexpr):
    """outliers [1 + K]: the number of flags that are set, then their places in order. One program."""
    count = tl.load(flags) * 0
    for k0 in range(0, K, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        flag = tl.load(flags + k, mask=k < K, other=0)
        tl.store(outliers + count + tl.cumsum(flag, 0), k, mask=flag > 0)
        count += tl.sum(flag, 0)
    tl.store(outliers, count)
