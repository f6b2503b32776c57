"""Forward of info_nce's sigmoid variant (SigLIP): row sums over tiles of logits that are never stored.

FLOP: 2 N (M + K) D. Accumulation: fp32. Logits in natural units.
"""

from __future__ import annotations

import triton
import triton.language as tl

from limber_fast.kernels.common import descriptor, grouped_order
from limber_fast.kernels.info_nce import labels_within, live_mask, store_triple, tile_dots


@triton.jit
def softplus_and_slope(y):
    """log(1 + e^y) and its derivative, both in full relative precision."""
    e = tl.exp2(-tl.abs(y) * 1.4426950408889634)
    # log1p(e) = 2 atanh(e / (2 + e)), an odd series that 9 terms carry to fp32 for e <= 1
    z = e / (2.0 + e)
    u = z * z
    p = 2.805277705e-01 * u + 2.799416123e-01
    p = p * u + 4.002195075e-01
    p = p * u + 6.666640980e-01
    p = p * u + 2.0
    q = 1.0 / (1.0 + e)
    return tl.maximum(y, 0.0) + z * p, tl.where(y < 0, e * q, q)


@triton.jit(do_not_specialize=["N", "M", "num_m", "num_n", "first_part"])
def info_nce_sigmoid_kernel(
    image, text, scale, bias, image_norm, text_norm, labels, image_ids, text_ids, row_part, positive, row_extra,
    N, M, D, image_stride, text_stride, row0, num_m, num_n, first_part,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    HAS_LABELS: tl.constexpr, HAS_IDS: tl.constexpr, HAS_POSITIVE: tl.constexpr, HAS_EXTRAS: tl.constexpr,
    NORMALIZE: tl.constexpr, TMA: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The sigmoid variant: row sums of softplus(-z x), and of its derivatives by bias and scale, per tile."""
    factor = tl.load(scale)
    offset = tl.load(bias)
    row_field = num_m * BLOCK_M
    a = descriptor(image, N, D, image_stride, BLOCK_M, BLOCK_K, TMA)
    b = descriptor(text, M, D, text_stride, BLOCK_N, BLOCK_K, TMA)
    for tile in range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        pm, pn = grouped_order(tile, num_m, num_n, GROUP)
        m0, n0 = row0 + pm * BLOCK_M, pn * BLOCK_N
        acc = tile_dots(
            a, b, image_norm, text_norm, m0, n0, N, M, D, image_stride, text_stride, BLOCK_M, BLOCK_N, BLOCK_K,
            NORMALIZE, TMA, EVEN_K, PRECISION, STAGES,
        )  # fmt: skip
        rows, columns = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
        here_n = tl.arange(0, BLOCK_N)
        label, meets = labels_within(labels, rows, N, m0, n0, BLOCK_M, BLOCK_N, HAS_LABELS)
        y = acc * factor + offset
        if HAS_POSITIVE & meets:
            is_positive = label[:, None] == here_n[None, :]
            here = (label >= 0) & (label < BLOCK_N) & (rows < N)
            tl.store(positive + rows, tl.sum(tl.where(is_positive, acc, 0.0), 1), mask=here)
            y = tl.where(is_positive, -y, y)
        # So far down neither the loss nor its slope is anything.
        if HAS_IDS:
            row_id = tl.load(image_ids + rows, mask=rows < N, other=0)
            column_id = tl.load(text_ids + columns, mask=columns < M, other=0)
            equal = row_id[:, None] == column_id[None, :]
            if HAS_POSITIVE:
                equal = equal & (label[:, None] != here_n[None, :])
            y = tl.where(equal, -1e18, y)
        if n0 + BLOCK_N > M:  # rows past the end have sums of their own, which nobody reads
            y = tl.where((here_n < M - n0)[None, :], y, -1e18)
        loss, slope = softplus_and_slope(y)
        if HAS_POSITIVE & meets:
            slope = tl.where(label[:, None] == here_n[None, :], -slope, slope)
        row_at = (first_part + pn).to(tl.int64) * (3 * row_field) + pm * BLOCK_M + tl.arange(0, BLOCK_M)
        everywhere = rows >= 0
        store_triple(
            row_part, row_field, row_at, tl.sum(slope, 1), tl.sum(loss, 1), tl.sum(slope * acc, 1), everywhere
        )
        if HAS_EXTRAS:
            negative, _ = live_mask(
                labels, image_ids, text_ids, rows, columns, N, M, HAS_LABELS, HAS_IDS, HAS_POSITIVE
            )
            best = tl.max(tl.where(negative, acc * factor * 1.4426950408889634, float("-inf")), 1)
            nothing = tl.zeros((BLOCK_M,), tl.float32)
            store_triple(row_extra, row_field, row_at, best, nothing, nothing, everywhere)
