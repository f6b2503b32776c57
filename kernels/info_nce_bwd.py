"""Backward of info_nce: tiles of dS are recomputed into a bounded workspace, from which two products feed both towers.

    dS_ij = a_i P_ij + b_j Q_ij - [positive] ... (csrc/cpu/info_nce_bwd.h has the formula),  d_image = scale dS T,
    d_text = scale dS^T I

The workspace holds macro-tiles of G = dS / unit in the towers' dtype, unit the largest upstream gradient: |G| <= 2
needs no care in 16 bits. What a tile takes of its rows and columns is found once, before: a weight each, and the span
of a block's log-sum-exps (`info_nce_weights_kernel`); positives are gathered by row. `info_nce_ds_kernel` fills it,
`info_nce_dual_kernel` multiplies it both ways into fp32 accumulators; macro-tiles follow each other in launch order
and each accumulator element has one writer per launch, so that L2's additions (TMA's) come in one order: the same bits
on every run, and no atomic that others contend for, which leaves a variant with such nothing to win. Macro-tiles run
along a row of blocks, so d_image's accumulator is one block of rows and only d_text's is whole. With fused
normalisation G is divided by both norms, the products take the towers as they are, and the last kernel multiplies by
the row's own norm again; in fp16 G is 2^14 times as large, for norms of a tower up to 2^14 apart: a row shorter than
that adds nothing to the other tower's gradients.

FLOP: 6 N (M + K) D: 2 to recompute, 4 for the products. Logarithms and exponents: base 2.

No tiles are kept from the forward (`cache_mb`). By the ceilings of sm_90 a kept 16-bit exponential costs 4 bytes of
DRAM, 1.33 ps, and recomputing it 2 D flop, 1.28 / 1.92 / 2.57 ps at D = 512 / 768 / 1024. It would lose 1% of both
passes at 512 and save 8 / 12% while all tiles fit (N <= 11585 in 256 MiB), but 1 / 1.5% at N = 32768. Not yet built.
"""

from __future__ import annotations

import triton
import triton.language as tl

from limber_fast.kernels.common import column_halves, descriptor, grouped_order
from limber_fast.kernels.info_nce import (
    exponents,
    labels_within,
    live_mask,
    put_at_label,
    put_beyond,
    split_scale,
    tile_dots,
)
from limber_fast.kernels.info_nce_sigmoid import softplus_and_slope

# Bits between the largest and the smallest log-sum-exp of a tile that one exponential can serve: 2^-60 .. 2^60 around
# their middle, and a product of two factors below 2^-120 is no gradient.
SPREAD = tl.constexpr(120.0)


@triton.jit
def weights_of(state, n, i, mask, gradient, shift):
    """gradient 2^(shift - log-sum-exp) of rows (or columns) i."""
    exponent = tl.load(state + i, mask=mask, other=0.0)
    remainder = tl.load(state + n + i, mask=mask, other=0.0)
    return gradient * tl.exp2((shift - exponent) - remainder)


@triton.jit
def at_positive(state, n, i, mask, gradient, smoothing, HAS_SMOOTHING: tl.constexpr):
    """dS at the positive of rows (or columns) i: P - 1 = expm1(-nll), however close to 1 the probability is."""
    if HAS_SMOOTHING:
        slope = expm1_of_minus(tl.load(state + 4 * n + i, mask=mask, other=0.0))
        slope += smoothing - tl.load(state + 5 * n + i, mask=mask, other=0.0)
    else:
        slope = expm1_of_minus(tl.load(state + 2 * n + i, mask=mask, other=0.0))
    return gradient * slope


@triton.jit
def expm1_of_minus(y):
    """e^-y - 1 for y >= 0 in full relative precision: a series below 1/4, where the difference would cancel."""
    p = y * (1.0 / 720.0) - 1.0 / 120.0
    p = p * y + 1.0 / 24.0
    p = p * y - 1.0 / 6.0
    p = p * y + 0.5
    p = p * y - 1.0
    return tl.where(y < 0.25, p * y, tl.exp2(-y * 1.4426950408889634) - 1.0)


@triton.jit(do_not_specialize=["n"])
def info_nce_weights_kernel(state, grad, unit, weight, span, n, BLOCK: tl.constexpr):
    """weight = grad / unit 2^(centre - log-sum-exp) of a block of rows (or columns), zeros past the end, and its span:
    (smallest log-sum-exp, largest, centre between them), whose centre is an integer.
    """
    block = tl.program_id(0)
    i = block * BLOCK + tl.arange(0, BLOCK)
    here = tl.minimum(i, n - 1)  # past the end the last line's: minimum and maximum stay as they are
    exponent, remainder = tl.load(state + here), tl.load(state + n + here)
    low, high = tl.min(exponent + remainder, 0), tl.max(exponent + remainder, 0)
    centre = tl.floor(0.5 * (low + high))
    share = tl.load(grad + i, mask=i < n, other=0.0) / tl.load(unit)
    tl.store(weight + i, share * tl.exp2((centre - exponent) - remainder))
    tl.store(span + 3 * block, low)
    tl.store(span + 3 * block + 1, high)
    tl.store(span + 3 * block + 2, centre)


@triton.jit(do_not_specialize=["N", "M", "num_m", "num_n"])
def info_nce_ds_kernel(
    image, text, scale, bias, image_norm, text_norm, labels, image_ids, text_ids, row_state, col_state, row_grad,
    col_grad, row_weight, col_weight, row_span, col_span, unit, norm_unit, row_norm_g, col_norm_g, g, N, M, D,
    image_stride, text_stride, row0, column0, num_m, num_n, g_stride, smoothing,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, SPAN_M: tl.constexpr,
    SPAN_N: tl.constexpr, HAS_LABELS: tl.constexpr, HAS_IDS: tl.constexpr, HAS_POSITIVE: tl.constexpr,
    HAS_COLUMNS: tl.constexpr, HAS_SMOOTHING: tl.constexpr, SIGMOID: tl.constexpr, NORMALIZE: tl.constexpr,
    SEPARATE: tl.constexpr, WIDE: tl.constexpr, WARP_GROUPS: tl.constexpr, TMA: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """G of rows row0 .. + num_m BLOCK_M and columns column0 .. + num_n BLOCK_N, whole tiles, zeros past the ends.

    SEPARATE False: the tiles whose log-sum-exps one exponential can serve, known before the product; True: the others,
    in tiles of their own within those of SPAN_M x SPAN_N.
    """
    factor, factor_low = split_scale(scale)
    inverse_unit = 1.0 / tl.load(unit)
    if SIGMOID:
        plain_factor, offset = tl.load(scale), tl.load(bias)
    if NORMALIZE:
        norm_factor = tl.load(norm_unit)
    a_ = descriptor(image, N, D, image_stride, BLOCK_M, BLOCK_K, TMA)
    b_ = descriptor(text, M, D, text_stride, BLOCK_N, BLOCK_K, TMA)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), disable_licm=True):
        pm, pn = grouped_order(tile, num_m, num_n, GROUP)
        m0, n0 = row0 + pm * BLOCK_M, column0 + pn * BLOCK_N
        low, high = 0.0, 0.0
        if not SIGMOID:
            row_block, column_block = m0 // SPAN_M, n0 // SPAN_N
            low, high = tl.load(row_span + 3 * row_block), tl.load(row_span + 3 * row_block + 1)
            if HAS_COLUMNS:
                low = tl.minimum(low, tl.load(col_span + 3 * column_block))
                high = tl.maximum(high, tl.load(col_span + 3 * column_block + 1))
        one_serves = (high - low <= SPREAD) & (tl.abs(high) < 1e6)  # false for NaN and infinity
        if one_serves != SEPARATE:
            acc = tile_dots(
                a_, b_, image_norm, text_norm, m0, n0, N, M, D, image_stride, text_stride, BLOCK_M, BLOCK_N, BLOCK_K,
                NORMALIZE, TMA, EVEN_K, PRECISION, STAGES,
            )  # fmt: skip
            rows, columns = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
            row_live, col_live = rows < N, columns < M
            if SIGMOID or SEPARATE or HAS_SMOOTHING:
                a = tl.load(row_grad + rows, mask=row_live, other=0.0) * inverse_unit
                if HAS_COLUMNS:
                    b = tl.load(col_grad + columns, mask=col_live, other=0.0) * inverse_unit
            if SIGMOID:
                x = acc * plain_factor + offset
                negative, is_positive = live_mask(
                    labels, image_ids, text_ids, rows, columns, N, M, HAS_LABELS, HAS_IDS, HAS_POSITIVE
                )
                _, slope = softplus_and_slope(tl.where(is_positive, -x, x))
                tile_g = tl.where(is_positive, -slope, slope) * a[:, None]
                tile_g = tl.where(negative | is_positive, tile_g, 0.0)
            else:
                if SEPARATE:
                    # The remainder goes to the weight: 32 numbers less a thread than three vectors of columns.
                    exponent = tl.load(row_state + rows, mask=row_live, other=0.0)
                    weight = weights_of(row_state, N, rows, row_live, a, exponent)
                    e = tl.exp2(exponents(acc, factor, factor_low, exponent[:, None], WIDE))
                    tile_g = e * weight[:, None]
                    if HAS_COLUMNS:
                        exponent = tl.load(col_state + columns, mask=col_live, other=0.0)
                        weight = weights_of(col_state, M, columns, col_live, b, exponent)
                        e = tl.exp2(exponents(acc, factor, factor_low, exponent[None, :], WIDE))
                        tile_g = tl.fma(e, weight[None, :], tile_g)  # as a product and a sum they spill with labels
                else:
                    shift = tl.floor(0.5 * (low + high))
                    weight = tl.load(row_weight + rows) * tl.exp2(shift - tl.load(row_span + 3 * row_block + 2))
                    e = tl.exp2(exponents(acc, factor, factor_low, shift, WIDE))
                    if HAS_COLUMNS:
                        down = tl.exp2(shift - tl.load(col_span + 3 * column_block + 2))
                        tile_g = e * (weight[:, None] + (tl.load(col_weight + columns) * down)[None, :])
                    else:
                        tile_g = e * weight[:, None]
                if HAS_SMOOTHING:
                    tile_g -= (a * tl.load(row_state + 5 * N + rows, mask=row_live, other=0.0))[:, None]
                    if HAS_COLUMNS:
                        tile_g -= (b * tl.load(col_state + 5 * M + columns, mask=col_live, other=0.0))[None, :]
                if HAS_IDS:
                    row_id = tl.load(image_ids + rows, mask=row_live, other=0)
                    column_id = tl.load(text_ids + columns, mask=col_live, other=0)
                    tile_g = tl.where(row_id[:, None] == column_id[None, :], 0.0, tile_g)
                if HAS_POSITIVE:
                    label, meets = labels_within(labels, rows, N, m0, n0, BLOCK_M, BLOCK_N, HAS_LABELS)
                    if meets:
                        share = tl.load(row_grad + rows, mask=row_live, other=0.0) * inverse_unit
                        own = at_positive(row_state, N, rows, row_live, share, smoothing, HAS_SMOOTHING)
                        if HAS_COLUMNS:  # gathered by row: a thread has fewer rows than columns
                            here = (label >= 0) & (label < BLOCK_N) & row_live
                            share = tl.load(col_grad + n0 + label, mask=here, other=0.0) * inverse_unit
                            own += at_positive(col_state, M, n0 + label, here, share, smoothing, HAS_SMOOTHING)
                        _, tile_g = put_at_label(tile_g, label, own[:, None], BLOCK_M, BLOCK_N, WARP_GROUPS)
                if (m0 + BLOCK_M > N) | (n0 + BLOCK_N > M):
                    tile_g = put_beyond(tile_g, N - m0, M - n0, 0.0, BLOCK_M, BLOCK_N, WARP_GROUPS)
            if NORMALIZE:
                row_norm = tl.load(row_norm_g + rows, mask=row_live, other=1.0)
                col_norm = tl.load(col_norm_g + columns, mask=col_live, other=1.0)
                tile_g = tile_g * (norm_factor / row_norm)[:, None] / col_norm[None, :]
            base = g + (pm * BLOCK_M).to(tl.int64) * g_stride + pn * BLOCK_N
            at = tl.arange(0, BLOCK_M)[:, None] * g_stride + tl.arange(0, BLOCK_N)[None, :]
            tl.store(base + at, tile_g.to(g.dtype.element_ty))


@triton.jit
def product_into(
    pid, g, x, acc_out, g_rows, g_columns, depth, D, g_stride, x_stride, acc_stride, x_row0, x_rows, out_row0, out_rows,
    num_d,
    FIRST: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """acc_out[out_row0 + ., :] (+)= G x[x_row0 + ., :], or G^T x; one tile [BLOCK_M, BLOCK_D].

    With TMA L2 adds the tile to acc_out: it passes shared memory once. An element has one writer a launch, so the order
    of its sums is fixed. Without TMA the accumulator starts from acc_out: a second tile of registers in the epilogue
    spills. FIRST: acc_out holds nothing yet. G is whole tiles with zeros past the ends, so only x needs its bounds.
    """
    tl.assume(depth > 0)
    pm, d0 = pid // num_d, (pid % num_d) * BLOCK_D
    out_row = out_row0 + pm * BLOCK_M
    if TMA:
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        x_ = descriptor(x, x_rows, D, x_stride, BLOCK_K, BLOCK_D, TMA)
        if TRANSPOSED:
            g_ = descriptor(g, g_rows, g_columns, g_stride, BLOCK_K, BLOCK_M, TMA)
            for k in tl.range(0, depth, BLOCK_K, num_stages=STAGES):
                g_tile = g_.load([k, pm * BLOCK_M]).T
                acc = tl.dot(g_tile, x_.load([x_row0 + k, d0]), acc, input_precision=PRECISION)
        else:
            g_ = descriptor(g, g_rows, g_columns, g_stride, BLOCK_M, BLOCK_K, TMA)
            for k in tl.range(0, depth, BLOCK_K, num_stages=STAGES):
                g_tile = g_.load([pm * BLOCK_M, k])
                acc = tl.dot(g_tile, x_.load([x_row0 + k, d0]), acc, input_precision=PRECISION)
        # By halves: the compiler gives a copy of the whole accumulator memory of its own beside the operands' ring.
        HALF: tl.constexpr = BLOCK_D // 2
        left, right = column_halves(acc, BLOCK_M, BLOCK_D)
        out = descriptor(acc_out, out_rows, D, acc_stride, BLOCK_M, HALF, TMA)
        if FIRST:
            out.store([out_row, d0], left)
            out.store([out_row, d0 + HALF], right)
        else:
            out.atomic_add([out_row, d0], left)
            out.atomic_add([out_row, d0 + HALF], right)
    else:
        rd, rr, rk = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
        base = acc_out + out_row.to(tl.int64) * acc_stride + d0
        at = rr[:, None] * acc_stride + rd[None, :]
        mask = (rr < out_rows - out_row)[:, None] & (rd < D - d0)[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32) if FIRST else tl.load(base + at, mask=mask, other=0.0)
        # Masks, not clamped columns: a clamp hides from the compiler that the addresses are contiguous.
        px = x + x_row0.to(tl.int64) * x_stride + d0 + (rk[:, None] * x_stride + rd[None, :])
        if TRANSPOSED:
            pg = g + pm * BLOCK_M + (rk[None, :] * g_stride + rr[:, None])
            step = BLOCK_K * g_stride
        else:
            pg = g + (pm * BLOCK_M).to(tl.int64) * g_stride + (rr[:, None] * g_stride + rk[None, :])
            step = BLOCK_K
        for k in tl.range(0, depth, BLOCK_K, num_stages=STAGES):
            right = tl.load(px, mask=(rk < x_rows - x_row0 - k)[:, None] & (rd < D - d0)[None, :], other=0.0)
            acc = tl.dot(tl.load(pg), right, acc, input_precision=PRECISION)
            pg += step
            px += BLOCK_K * x_stride
        tl.store(base + at, acc, mask=mask)


@triton.jit(do_not_specialize=["N", "M", "acc_rows", "image_items", "text_items", "num_d"])
def info_nce_dual_kernel(
    g, image, text, image_acc, text_acc, N, M, D, image_stride, text_stride, g_stride, acc_stride, row0, column0,
    acc_row0, acc_rows, num_rows, num_columns, image_items, text_items, num_d,
    FIRST_IMAGE: tl.constexpr, FIRST_TEXT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Both products of a macro-tile of num_rows x num_columns in one grid: image_acc += G text, text_acc += G^T image.

    image_acc holds rows from acc_row0 on, acc_rows of them; text_acc all M. A role without items is not wanted.
    """
    # One item a program: as a loop over items the wide tile spilled 19 registers.
    item = tl.program_id(0)
    if item < image_items:
        product_into(
            item, g, text, image_acc, num_rows, num_columns, num_columns, D, g_stride, text_stride, acc_stride, column0,
            M, row0 - acc_row0, acc_rows, num_d, FIRST_IMAGE, False, BLOCK_M, BLOCK_D, BLOCK_K, TMA, PRECISION, STAGES,
        )  # fmt: skip
    else:
        product_into(
            item - image_items, g, image, text_acc, num_rows, num_columns, num_rows, D, g_stride, image_stride,
            acc_stride, row0, N, column0, M, num_d, FIRST_TEXT, True, BLOCK_M, BLOCK_D, BLOCK_K, TMA, PRECISION, STAGES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n"])
def info_nce_gradient_kernel(
    acc, x, norm, norm_g, out, scale, unit, norm_unit, n, D, x_stride, acc_stride,
    NORMALIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out = scale * unit * acc; through the fused normalisation u = x / |x| it is (g - u <u, g>) / |x|, or g / eps
    where the norm is eps. norm_g: what G was divided by. acc and out may be the same memory.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = rows < n
    factor = tl.load(scale) * tl.load(unit) + tl.zeros((BLOCK_M,), tl.float32)
    along = tl.zeros((BLOCK_M,), tl.float32)
    length = along + 1.0
    line = rows.to(tl.int64)[:, None]
    if NORMALIZE:
        length = tl.load(norm + rows, mask=live, other=1.0)
        factor = factor * (tl.load(norm_g + rows, mask=live, other=1.0) / tl.load(norm_unit))
        for d in range(0, D, BLOCK_D):
            columns = d + tl.arange(0, BLOCK_D)
            mask = live[:, None] & (columns < D)[None, :]
            u = tl.load(x + line * x_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32) / length[:, None]
            along += tl.sum(tl.load(acc + line * acc_stride + columns[None, :], mask=mask, other=0.0) * u, 1)
        along = tl.where(length == 1e-12, 0.0, along)
    for d in range(0, D, BLOCK_D):
        columns = d + tl.arange(0, BLOCK_D)
        mask = live[:, None] & (columns < D)[None, :]
        v = tl.load(acc + line * acc_stride + columns[None, :], mask=mask, other=0.0)
        if NORMALIZE:
            u = tl.load(x + line * x_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32) / length[:, None]
            v = (v - u * along[:, None]) / length[:, None]
        tl.store(out + line * D + columns[None, :], (v * factor[:, None]).to(out.dtype.element_ty), mask=mask)
