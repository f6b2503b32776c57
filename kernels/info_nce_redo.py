"""Forward of info_nce where one exponential does not serve a strip: an exponential per row and one per column."""

from __future__ import annotations

import triton
import triton.language as tl

from limber_fast.kernels.common import descriptor, merge_sums
from limber_fast.kernels.info_nce import (
    log2_scale,
    put_at_label,
    put_beyond,
    row_labels,
    store_triple,
    tile_dots,
    tiles_of,
)


@triton.jit
def exact_sums(x, AXIS: tl.constexpr):
    """(shift, sum, moment) along AXIS, each line under its own maximum; (0, 0, 0) where all is minus infinity."""
    top = tl.max(x, AXIS)
    shift = tl.where(top == float("-inf"), 0.0, tl.floor(top + 0.5))
    x = x - tl.expand_dims(shift, AXIS)
    e = tl.exp2(x)
    return shift, tl.sum(e, AXIS), tl.sum(tl.where(e == 0.0, 0.0, e * x), AXIS)


@triton.jit
def add_triple(part, field, at, shift, total, moment, mask, FRESH):
    """Stores a sum, with what is there already unless FRESH. Kept in memory: beside an accumulator they would spill."""
    if not FRESH:
        tl.debug_barrier()
        shift, total, moment = merge_sums(
            tl.load(part + at, mask=mask, other=0.0),
            tl.load(part + field + at, mask=mask, other=0.0),
            tl.load(part + 2 * field + at, mask=mask, other=0.0),
            shift, total, moment,
        )  # fmt: skip
    store_triple(part, field, at, shift, total, moment, mask)


@triton.jit(do_not_specialize=["N", "M", "num_m", "num_n", "first_part"])
def info_nce_redo_kernel(
    image, text, scale, image_norm, text_norm, labels, image_ids, text_ids, row_part, col_part, redo,
    N, M, D, image_stride, text_stride, row0, num_m, num_n, first_part,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPAN_N: tl.constexpr, STRIP: tl.constexpr,
    HAS_LABELS: tl.constexpr, HAS_IDS: tl.constexpr, HAS_POSITIVE: tl.constexpr, HAS_COLUMNS: tl.constexpr,
    NORMALIZE: tl.constexpr, WARP_GROUPS: tl.constexpr, TMA: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The strips that `info_nce_fwd_kernel` marked, with an exponential per row and one per column. Normally none.

    The forward's tiles are BLOCK_M x SPAN_N; these are as wide as their registers allow.
    """
    factor = log2_scale(scale).to(tl.float32)
    a = descriptor(image, N, D, image_stride, BLOCK_M, BLOCK_K, TMA)
    b = descriptor(text, M, D, text_stride, BLOCK_N, BLOCK_K, TMA)
    row_field, col_field = num_m * BLOCK_M, num_n * SPAN_N
    for item in range(tl.program_id(0), tl.cdiv(num_m, STRIP) * num_n, tl.num_programs(0)):
        if tl.load(redo + item) != 0:
            at, pn = item // num_n, item % num_n
            first = at * STRIP
            wide = SPAN_N // BLOCK_N
            for step in tl.range(0, tiles_of(first, num_m, STRIP) * wide, disable_licm=True):
                tile, piece = step // wide, step % wide
                pm = first + tile
                m0, n0 = row0 + pm * BLOCK_M, pn * SPAN_N + piece * BLOCK_N
                tl.assume(D > 0)
                acc = tile_dots(
                    a, b, image_norm, text_norm, m0, n0, N, M, D, image_stride, text_stride, BLOCK_M, BLOCK_N, BLOCK_K,
                    NORMALIZE, TMA, EVEN_K, PRECISION, STAGES,
                )  # fmt: skip
                rows, columns = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
                x, nothing = acc * factor, tl.full((), float("-inf"), tl.float32)
                if HAS_POSITIVE:
                    label = row_labels(labels, rows, N, HAS_LABELS) - n0
                    _, x = put_at_label(x, label, nothing, BLOCK_M, BLOCK_N, WARP_GROUPS)
                if HAS_IDS:
                    row_id = tl.load(image_ids + rows, mask=rows < N, other=0)
                    column_id = tl.load(text_ids + columns, mask=columns < M, other=0)
                    x = tl.where(row_id[:, None] == column_id[None, :], nothing, x)
                x = put_beyond(x, N - m0, M - n0, nothing, BLOCK_M, BLOCK_N, WARP_GROUPS)
                shift, total, moment = exact_sums(x, 1)
                row_at = (first_part + pn).to(tl.int64) * (3 * row_field) + pm * BLOCK_M + tl.arange(0, BLOCK_M)
                add_triple(row_part, row_field, row_at, shift, total, moment, rows >= row0, piece == 0)
                if HAS_COLUMNS:
                    shift, total, moment = exact_sums(x, 0)
                    col_at = at.to(tl.int64) * (3 * col_field) + columns
                    add_triple(col_part, col_field, col_at, shift, total, moment, columns < M, tile == 0)
