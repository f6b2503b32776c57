"""Forward of info_nce: row and column log-sum-exp in one pass over tiles of logits that are never stored.

Logits live in base 2: x_ij = scale log2(e) <image_i, text_j>; the bias of the softmax cancels and is left out. A
program walks over tiles of BLOCK_M x BLOCK_N. A tile's shift is an integer near its maximum: one exponential per
element serves its row and column sums, and is exact as long as no sum falls below 2^-64; tiles where one does are left
to `info_nce_redo_kernel`, which takes two. Partial sums (one triple per row or column of a tile) are merged in a fixed
order: no atomics, the same bits on every run. The positive of a row is never summed with the negatives.

FLOP: 2 N (M + K) D. Accumulation: fp32; the last step per row in fp64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from limber_fast.kernels.common import LOG2E, column_halves, descriptor, dot_rows, grouped_order, merge_sums

# Sums above this are exact to fp32 under the shared shift: the largest element is about 1.
LEAST_SUM = tl.constexpr(2.0**-64)


@triton.jit
def row_labels(labels, rows, N, HAS_LABELS: tl.constexpr):
    """Column of each row's positive."""
    return tl.load(labels + rows, mask=rows < N, other=-1) if HAS_LABELS else rows


@triton.jit
def labels_within(
    labels, rows, N, m0, n0, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LABELS: tl.constexpr
):  # fmt: skip
    """(each row's positive as a column of the tile, whether any row may have one there)."""
    label = row_labels(labels, rows, N, HAS_LABELS) - n0
    if HAS_LABELS:
        return label, tl.max(((label >= 0) & (label < BLOCK_N)).to(tl.int32), 0) > 0
    else:
        return label, (m0 < n0 + BLOCK_N) & (n0 < m0 + BLOCK_M)


@triton.jit
def live_mask(
    labels, image_ids, text_ids, rows, columns, N, M,
    HAS_LABELS: tl.constexpr, HAS_IDS: tl.constexpr, HAS_POSITIVE: tl.constexpr,
):  # fmt: skip
    """(negatives, positives) of a tile as masks; `columns` counts within the matrix, labels and ids within the text."""
    inside = (rows < N)[:, None] & (columns < M)[None, :]
    if HAS_POSITIVE:
        label = row_labels(labels, rows, N, HAS_LABELS)
        positive = (label[:, None] == columns[None, :]) & inside
        negative = inside & (label[:, None] != columns[None, :])
    else:
        positive = inside & (rows < 0)[:, None]
        negative = inside
    if HAS_IDS:
        row_id = tl.load(image_ids + rows, mask=rows < N, other=0)
        column_id = tl.load(text_ids + columns, mask=columns < M, other=0)
        negative = negative & (row_id[:, None] != column_id[None, :])
    return negative, positive


@triton.jit
def tile_dots(
    image, text, image_norm, text_norm, m0, n0, N, M, D, image_stride, text_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NORMALIZE: tl.constexpr,
    TMA: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Similarities of a tile; with NORMALIZE divided by the norms, which therefore round nothing but the result."""
    acc = dot_rows(
        image, text, m0, n0, N, M, D, image_stride, text_stride, BLOCK_M, BLOCK_N, BLOCK_K, TMA, EVEN_K, PRECISION,
        STAGES,
    )  # fmt: skip
    if NORMALIZE:
        rows, columns = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
        row_factor = 1.0 / tl.load(image_norm + rows, mask=rows < N, other=1.0)
        column_factor = 1.0 / tl.load(text_norm + columns, mask=columns < M, other=1.0)
        acc = acc * row_factor[:, None] * column_factor[None, :]
    return acc


@triton.jit
def log2_scale(scale):
    """log2(e) * scale as fp64; scale 0 keeps the order of the logits for d loss / d scale."""
    s = tl.load(scale).to(tl.float64)
    return tl.where(tl.abs(s) < 1e-30, 1e-30, s) * LOG2E


@triton.jit
def split_scale(scale):
    """log2(e) * scale as a float and what it loses."""
    whole = log2_scale(scale)
    high = whole.to(tl.float32)
    return high, (whole - high.to(tl.float64)).to(tl.float32)


@triton.jit
def exponents(acc, factor, factor_low, shift, WIDE: tl.constexpr):
    """x - shift in one rounding; WIDE (fp32 towers) adds what log2(e) * scale loses as one float."""
    x = tl.fma(acc, tl.zeros_like(acc) + factor, tl.zeros_like(acc) - shift)
    if WIDE:  # a masked element is infinite: times the small rest it could cancel to NaN
        x = tl.fma(tl.maximum(tl.minimum(acc, 3e38), -3e38), tl.zeros_like(acc) + factor_low, x)
    return x


@triton.jit
def store_triple(part, field, at, shift, total, moment, mask):
    tl.store(part + at, shift, mask=mask)
    tl.store(part + field + at, total, mask=mask)
    tl.store(part + 2 * field + at, moment, mask=mask)


@triton.jit
def piece_sums(
    acc, factor, factor_low, shift, col_out, col_field, columns_left,
    BLOCK_N: tl.constexpr, HAS_COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Row sums and moments of a piece of a tile; its column triples go to col_out. Third: its least live column sum."""
    x = exponents(acc, factor, factor_low, shift, WIDE)
    e = tl.exp2(x)
    moment = e * x
    least = 1.0
    if HAS_COLUMNS:
        columns = tl.arange(0, BLOCK_N)
        col_sum, col_moment = tl.sum(e, 0), tl.sum(moment, 0)
        store_triple(col_out, col_field, columns, col_sum * 0 + shift, col_sum, col_moment, columns < columns_left)
        least = tl.min(tl.where(columns < columns_left, col_sum, 1.0), 0)
    return tl.sum(e, 1), tl.sum(moment, 1), least


@triton.jit
def tile_sums(
    acc, factor, factor_low, shift, col_out, col_field, columns_left,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PIECES: tl.constexpr, HAS_COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """As `piece_sums`, for one piece of the columns after another: fewer exponentials live at once."""
    if PIECES == 1:
        return piece_sums(acc, factor, factor_low, shift, col_out, col_field, columns_left, BLOCK_N, HAS_COLUMNS, WIDE)
    else:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = column_halves(acc, BLOCK_M, BLOCK_N)
        left_sum, left_moment, left_least = tile_sums(
            left, factor, factor_low, shift, col_out, col_field, columns_left, BLOCK_M, HALF, PIECES // 2, HAS_COLUMNS,
            WIDE,
        )  # fmt: skip
        right_sum, right_moment, right_least = tile_sums(
            right, factor, factor_low, shift, col_out + HALF, col_field, columns_left - HALF, BLOCK_M, HALF,
            PIECES // 2, HAS_COLUMNS, WIDE,
        )  # fmt: skip
        return left_sum + right_sum, left_moment + right_moment, tl.minimum(left_least, right_least)


@triton.jit
def info_nce_fwd_kernel(
    image, text, scale, image_norm, text_norm, labels, image_ids, text_ids, row_part, col_part, redo, positive,
    row_extra, col_extra, N, M, D, image_stride, text_stride, row0, num_m, num_n, first_part, row_field, col_field,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    HAS_LABELS: tl.constexpr, HAS_IDS: tl.constexpr, HAS_POSITIVE: tl.constexpr, HAS_COLUMNS: tl.constexpr,
    HAS_EXTRAS: tl.constexpr, NORMALIZE: tl.constexpr, WIDE: tl.constexpr, PIECES: tl.constexpr,
    TMA: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows row0 .. row0 + num_m BLOCK_M - 1 against all columns.

    row_part [3, parts, num_m BLOCK_M], part first_part + column block; col_part [3, num_m, num_n BLOCK_N]; strides of
    the triples' fields: row_field, col_field. redo [num_m, num_n]: 1 where the tile needs two exponentials.
    positive [N]: the similarity. row_extra, col_extra: (best, sum, number) of the negatives' x, laid out as the parts.
    """
    factor, factor_low = split_scale(scale)
    flipped = factor < 0
    factor_low = tl.where(flipped, -factor_low, factor_low)
    factor = tl.abs(factor)
    # So far below any logit that its exponential is 0, and finite: its moment is 0 as well.
    nowhere = tl.maximum(-1e18 / factor, -3e38)
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
        # Most tiles meet no positive and no edge: nothing is masked there. Columns count from the tile's first, which
        # makes masks of compares with constants; as one mask [BLOCK_M, BLOCK_N] they spilled 119 registers.
        here_m, here_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
        if flipped:
            acc = -acc
        if HAS_POSITIVE:
            label, meets = labels_within(labels, rows, N, m0, n0, BLOCK_M, BLOCK_N, HAS_LABELS)
            if HAS_LABELS | meets:
                is_positive = label[:, None] == here_n[None, :]
                here = (label >= 0) & (label < BLOCK_N) & (rows < N)
                own = tl.sum(tl.where(is_positive, acc, 0.0), 1)
                tl.store(positive + rows, tl.where(flipped, -own, own), mask=here)
                acc = tl.where(is_positive, nowhere, acc)
        if HAS_IDS:
            row_id = tl.load(image_ids + rows, mask=rows < N, other=0)
            column_id = tl.load(text_ids + columns, mask=columns < M, other=0)
            acc = tl.where(row_id[:, None] == column_id[None, :], nowhere, acc)
        if m0 + BLOCK_M > N:
            acc = tl.where((here_m < N - m0)[:, None], acc, nowhere)
        if n0 + BLOCK_N > M:
            acc = tl.where((here_n < M - n0)[None, :], acc, nowhere)
        shift = tl.floor(tl.max(tl.max(acc, 1), 0) * factor + 0.5)
        row_at = (first_part + pn).to(tl.int64) * (num_m * BLOCK_M) + pm * BLOCK_M + tl.arange(0, BLOCK_M)
        col_at = pm.to(tl.int64) * (num_n * BLOCK_N) + n0
        row_sum, row_moment, least = tile_sums(
            acc, factor, factor_low, shift, col_part + col_at, col_field, M - n0, BLOCK_M, BLOCK_N, PIECES, HAS_COLUMNS,
            WIDE,
        )  # fmt: skip
        everywhere = rows >= 0
        store_triple(row_part, row_field, row_at, row_sum * 0 + shift, row_sum, row_moment, everywhere)
        least = tl.minimum(least, tl.min(tl.where(rows < N, row_sum, 1.0), 0))
        fits = (least >= LEAST_SUM) & (tl.abs(shift) < 1e6)
        tl.store(redo + pm.to(tl.int64) * num_n + pn, tl.where(fits, 0, 1).to(tl.int8))
        if HAS_EXTRAS:
            negative, _ = live_mask(
                labels, image_ids, text_ids, rows, columns, N, M, HAS_LABELS, HAS_IDS, HAS_POSITIVE
            )
            best = tl.where(negative, acc * factor, float("-inf"))
            kept = tl.where(negative, acc * factor, 0.0)
            one = negative.to(tl.float32)
            store_triple(row_extra, row_field, row_at, tl.max(best, 1), tl.sum(kept, 1), tl.sum(one, 1), everywhere)
            if HAS_COLUMNS:
                col_at = pm.to(tl.int64) * (num_n * BLOCK_N) + columns
                store_triple(
                    col_extra, col_field, col_at, tl.max(best, 0), tl.sum(kept, 0), tl.sum(one, 0), columns < M
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
def info_nce_redo_kernel(
    image, text, scale, image_norm, text_norm, labels, image_ids, text_ids, row_part, col_part, redo,
    N, M, D, image_stride, text_stride, row0, num_m, num_n, first_part, row_field, col_field,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_LABELS: tl.constexpr, HAS_IDS: tl.constexpr, HAS_POSITIVE: tl.constexpr, HAS_COLUMNS: tl.constexpr,
    NORMALIZE: tl.constexpr, TMA: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The tiles that `info_nce_fwd_kernel` marked, with an exponential per row and one per column. Normally none."""
    factor = log2_scale(scale).to(tl.float32)
    a = descriptor(image, N, D, image_stride, BLOCK_M, BLOCK_K, TMA)
    b = descriptor(text, M, D, text_stride, BLOCK_N, BLOCK_K, TMA)
    for tile in range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        if tl.load(redo + tile) != 0:
            pm, pn = tile // num_n, tile % num_n
            m0, n0 = row0 + pm * BLOCK_M, pn * BLOCK_N
            acc = tile_dots(
                a, b, image_norm, text_norm, m0, n0, N, M, D, image_stride, text_stride, BLOCK_M, BLOCK_N, BLOCK_K,
                NORMALIZE, TMA, EVEN_K, PRECISION, STAGES,
            )  # fmt: skip
            rows, columns = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
            negative, _ = live_mask(
                labels, image_ids, text_ids, rows, columns, N, M, HAS_LABELS, HAS_IDS, HAS_POSITIVE
            )
            x = tl.where(negative, acc * factor, float("-inf"))
            shift, total, moment = exact_sums(x, 1)
            row_at = (first_part + pn).to(tl.int64) * (num_m * BLOCK_M) + pm * BLOCK_M + tl.arange(0, BLOCK_M)
            store_triple(row_part, row_field, row_at, shift, total, moment, rows >= 0)
            if HAS_COLUMNS:
                shift, total, moment = exact_sums(x, 0)
                col_at = pm.to(tl.int64) * (num_n * BLOCK_N) + columns
                store_triple(col_part, col_field, col_at, shift, total, moment, columns < M)


@triton.jit
def info_nce_merge_kernel(
    part, extra, state, extra_state, parts, stride, field, extra_field, n, at, size,
    FIRST: tl.constexpr, HAS_EXTRAS: tl.constexpr, PLAIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merges `parts` partial triples, in order, into the running triples state[:3, at : at + n] of rows (or columns).

    PLAIN: the fields are sums of their own (sigmoid). FIRST: there are no running triples yet.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    zero = tl.zeros((BLOCK,), tl.float32)
    shift, total, moment, best, kept, live = zero, zero, zero, zero + float("-inf"), zero, zero
    if not FIRST:
        shift = tl.load(state + at + i, mask=mask, other=0.0)
        total = tl.load(state + size + at + i, mask=mask, other=0.0)
        moment = tl.load(state + 2 * size + at + i, mask=mask, other=0.0)
        if HAS_EXTRAS:
            best = tl.load(extra_state + at + i, mask=mask, other=0.0)
            kept = tl.load(extra_state + size + at + i, mask=mask, other=0.0)
            live = tl.load(extra_state + 2 * size + at + i, mask=mask, other=0.0)
    for p in range(0, parts):
        here = tl.cast(p, tl.int64) * stride + i
        other_shift = tl.load(part + here, mask=mask, other=0.0)
        other_total = tl.load(part + field + here, mask=mask, other=0.0)
        other_moment = tl.load(part + 2 * field + here, mask=mask, other=0.0)
        if PLAIN:
            shift, total, moment = shift + other_shift, total + other_total, moment + other_moment
        else:
            shift, total, moment = merge_sums(shift, total, moment, other_shift, other_total, other_moment)
        if HAS_EXTRAS:
            best = tl.maximum(best, tl.load(extra + here, mask=mask, other=0.0))
            kept += tl.load(extra + extra_field + here, mask=mask, other=0.0)
            live += tl.load(extra + 2 * extra_field + here, mask=mask, other=0.0)
    store_triple(state, size, at + i, shift, total, moment, mask)
    if HAS_EXTRAS:
        store_triple(extra_state, size, at + i, best, kept, live, mask)


@triton.jit
def log1p(r):
    """log(1 + r) for r >= 0 in full relative precision: the rounding of 1 + r is divided out."""
    u = 1.0 + r
    return tl.where(u == 1.0, r, tl.log(u) * (r / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def info_nce_finish_kernel(
    state, extra_state, positive, columns_of, scale, correct, n, smoothing,
    HAS_COLUMN: tl.constexpr, HAS_EXTRAS: tl.constexpr, HAS_STATS: tl.constexpr, SIGMOID: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Running triples in state[:3] -> the six fields of InfoNceState, in fp64. In place.

    positive [n]: similarity of each row's positive; with HAS_COLUMN that of row columns_of[i] (columns of permuted
    labels).
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    shift = tl.load(state + i, mask=mask, other=0.0).to(tl.float64)
    total = tl.load(state + n + i, mask=mask, other=1.0).to(tl.float64)
    moment = tl.load(state + 2 * n + i, mask=mask, other=0.0).to(tl.float64)
    at = i
    if HAS_COLUMN:
        at = tl.load(columns_of + i, mask=mask, other=0)
    dot = tl.load(positive + at, mask=mask, other=0.0)
    factor = log2_scale(scale)
    zero = shift * 0.0
    uniform = zero
    if SIGMOID:
        whole, rest, nll, loss, dscale = zero, zero, shift, total, moment
    else:
        x = factor * dot.to(tl.float64)
        empty = total == 0.0
        gap = tl.where(empty, 0.0, shift - x)
        ratio = tl.where(empty, 0.0, total * tl.exp2(tl.minimum(gap, 1000.0)))  # negatives : positive
        huge = gap > 900.0
        nll = tl.where(huge, 0.6931471805599453 * (gap + tl.log2(total)), log1p(ratio)) + 0.0 * x
        unit = tl.where(empty, 0.0, tl.where(huge, 1.0, ratio / (1.0 + ratio)) / tl.where(empty, 1.0, total))
        base = tl.where(huge, shift, x)
        rest = tl.where(huge, tl.log2(total), nll * 1.4426950408889634)
        whole = tl.floor(base + rest + 0.5)
        rest = (base - whole) + rest
        loss = nll
        dscale = tl.where(empty, 0.0, (moment + total * gap) * unit / factor)
        if HAS_EXTRAS:
            kept = tl.load(extra_state + n + i, mask=mask, other=0.0).to(tl.float64)
            live = tl.load(extra_state + 2 * n + i, mask=mask, other=0.0).to(tl.float64)
            above = x - (kept + x) / (live + 1.0)
            uniform = smoothing / (live + 1.0)
            loss += smoothing * above * 0.6931471805599453
            dscale += smoothing * above / factor
    if HAS_STATS:
        best = tl.load(extra_state + i, mask=mask, other=0.0)
        right = (loss == loss) & (factor.to(tl.float32) * dot > best)
        tl.store(correct + i, right.to(tl.uint8), mask=mask)
    tl.store(state + i, whole.to(tl.float32), mask=mask)
    tl.store(state + n + i, rest.to(tl.float32), mask=mask)
    tl.store(state + 2 * n + i, nll.to(tl.float32), mask=mask)
    tl.store(state + 3 * n + i, loss.to(tl.float32), mask=mask)
    tl.store(state + 4 * n + i, dscale.to(tl.float32), mask=mask)
    tl.store(state + 5 * n + i, uniform.to(tl.float32), mask=mask)


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


@triton.jit
def info_nce_sigmoid_kernel(
    image, text, scale, bias, image_norm, text_norm, labels, image_ids, text_ids, row_part, positive, row_extra,
    N, M, D, image_stride, text_stride, row0, num_m, num_n, first_part, row_field,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    HAS_LABELS: tl.constexpr, HAS_IDS: tl.constexpr, HAS_POSITIVE: tl.constexpr, HAS_EXTRAS: tl.constexpr,
    NORMALIZE: tl.constexpr, TMA: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The sigmoid variant: row sums of softplus(-z x), and of its derivatives by bias and scale, per tile."""
    factor = tl.load(scale)
    offset = tl.load(bias)
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
        if m0 + BLOCK_M > N:
            y = tl.where((rows < N)[:, None], y, -1e18)
        if n0 + BLOCK_N > M:
            y = tl.where((here_n < M - n0)[None, :], y, -1e18)
        loss, slope = softplus_and_slope(y)
        if HAS_POSITIVE & meets:
            slope = tl.where(label[:, None] == here_n[None, :], -slope, slope)
        row_at = (first_part + pn).to(tl.int64) * (num_m * BLOCK_M) + pm * BLOCK_M + tl.arange(0, BLOCK_M)
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


@triton.jit
def info_nce_norm_kernel(x, norm, n, D, stride, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """norm [n] = max(|row|, 1e-12); NaN stays."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = rows < n
    total = tl.zeros((BLOCK_M,), tl.float32)
    for d in range(0, D, BLOCK_D):
        columns = d + tl.arange(0, BLOCK_D)
        at = rows.to(tl.int64)[:, None] * stride + columns[None, :]
        v = tl.load(x + at, mask=mask[:, None] & (columns < D)[None, :], other=0.0).to(tl.float32)
        total += tl.sum(v * v, 1)
    length = tl.sqrt(total)
    tl.store(norm + rows, tl.where(length < 1e-12, 1e-12, length), mask=mask)
