"""Forward of info_nce: row and column log-sum-exp in one pass over tiles of logits that are never stored.

Logits live in base 2: x_ij = scale log2(e) <image_i, text_j>; the bias of the softmax cancels and is left out. A
program walks over strips: tiles of BLOCK_M x BLOCK_N, one below the other, whose column sums it keeps. A strip's shift
is an integer near the maximum of its first tile (of the left half, where tiles are taken in two): one exponential per
element serves row and column sums, and is exact as long as none leaves 2^-64 .. 2^64; strips where one does are left
to `info_nce_redo_kernel`, which takes two. Partial sums (one triple per row of a tile and per column of a strip) are
merged in a fixed order: no atomics, the same bits on every run. The positive of a row is never summed with the
negatives.

FLOP: 2 N (M + K) D. Accumulation: fp32; the last step per row in fp64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from limber_fast.kernels.common import LOG2E, column_halves, descriptor, dot_rows, grouped_order, merge_sums

# Sums within 2^-64 .. 2^64 are exact to fp32 under a shared shift: as `distance` has it.
FURTHEST = tl.constexpr(64 << 23)


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
def put_at_label(acc, label, value, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr):
    """(the element of each row in the column `label`, 0 without one; the tile with `value` there).

    Columns are numbered within each of GROUPS runs that different warps hold: the numbers are constants of the code.
    Those of a whole tile would be a register each, which the compiler keeps, and spills, through all tiles.
    """
    if GROUPS == 1:
        is_label = label[:, None] == tl.arange(0, BLOCK_N)[None, :]
        own = tl.sum(tl.where(is_label, acc, 0.0), 1)
        return own, tl.where(is_label, value, acc)
    else:
        RUN: tl.constexpr = BLOCK_N // GROUPS
        runs = tl.reshape(acc, (BLOCK_M, GROUPS, RUN))
        within = label[:, None] - RUN * tl.arange(0, GROUPS)[None, :]
        is_label = within[:, :, None] == tl.arange(0, RUN)[None, None, :]
        own = tl.sum(tl.sum(tl.where(is_label, runs, 0.0), 2), 1)
        put = value if len(value.shape) == 0 else tl.expand_dims(value, 2)
        return own, tl.reshape(tl.where(is_label, put, runs), (BLOCK_M, BLOCK_N))


@triton.jit
def put_beyond(acc, rows, columns, value, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr):
    """The tile with `value` everywhere but in its first `rows` and `columns`; GROUPS as above."""
    here_m = tl.arange(0, BLOCK_M)
    if GROUPS == 1:
        live = (here_m < rows)[:, None] & (tl.arange(0, BLOCK_N) < columns)[None, :]
        return tl.where(live, acc, value)
    else:
        RUN: tl.constexpr = BLOCK_N // GROUPS
        left = columns - RUN * tl.arange(0, GROUPS)
        live = (here_m < rows)[:, None, None] & (tl.arange(0, RUN)[None, None, :] < left[None, :, None])
        return tl.reshape(tl.where(live, tl.reshape(acc, (BLOCK_M, GROUPS, RUN)), value), (BLOCK_M, BLOCK_N))


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
def negatives_of(
    acc, labels, image_ids, text_ids, positive, nowhere, m0, n0, N, M,
    HAS_LABELS: tl.constexpr, HAS_IDS: tl.constexpr, HAS_POSITIVE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Similarities with `nowhere` at all that is no negative; those of positives are stored.

    Most tiles meet no positive and no edge: nothing is masked there.
    """
    rows = m0 + tl.arange(0, BLOCK_M)
    if HAS_POSITIVE:
        label, meets = labels_within(labels, rows, N, m0, n0, BLOCK_M, BLOCK_N, HAS_LABELS)
        if HAS_LABELS | meets:
            own, acc = put_at_label(acc, label, nowhere, BLOCK_M, BLOCK_N, GROUPS)
            here = (label >= 0) & (label < BLOCK_N) & (rows < N)
            tl.store(positive + rows, own, mask=here)
    if HAS_IDS:
        columns = n0 + tl.arange(0, BLOCK_N)
        row_id = tl.load(image_ids + rows, mask=rows < N, other=0)
        column_id = tl.load(text_ids + columns, mask=columns < M, other=0)
        acc = tl.where(row_id[:, None] == column_id[None, :], nowhere, acc)
    if (m0 + BLOCK_M > N) | (n0 + BLOCK_N > M):
        acc = put_beyond(acc, N - m0, M - n0, nowhere, BLOCK_M, BLOCK_N, GROUPS)
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
def no_sums(BLOCK_N: tl.constexpr, KEPT: tl.constexpr, LANES: tl.constexpr):
    if KEPT == 0:
        return tl.zeros((BLOCK_N,), tl.float32)
    else:
        return tl.zeros((KEPT, LANES, BLOCK_N), tl.float32)


@triton.jit
def column_sums(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KEPT: tl.constexpr, LANES: tl.constexpr):
    """Sums of the columns of [BLOCK_M, BLOCK_N]; with KEPT warps along the rows those of every thread, which are
    [KEPT, LANES, BLOCK_N].
    """
    if KEPT == 0:
        return tl.sum(x, 0)
    elif LANES == 32:  # tensor memory gives a thread one row
        return tl.sum(tl.reshape(x, (BLOCK_M // (32 * KEPT), KEPT, 32, BLOCK_N)), 0)
    else:  # where a tensor core leaves rows: bits 0 to 2 count lanes, bit 3 registers, the next warps
        return tl.sum(tl.sum(tl.reshape(x, (BLOCK_M // (16 * KEPT), KEPT, 2, 8, BLOCK_N)), 2), 0)


@triton.jit
def piece_sums(
    acc, factor, factor_low, shift, col_sum, col_moment,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KEPT: tl.constexpr, LANES: tl.constexpr, HAS_COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Row sums and moments of a piece of a tile, and its columns' added to those given."""
    x = exponents(acc, factor, factor_low, shift, WIDE)
    e = tl.exp2(x)
    moment = e * x
    if HAS_COLUMNS:
        col_sum += column_sums(e, BLOCK_M, BLOCK_N, KEPT, LANES)
        col_moment += column_sums(moment, BLOCK_M, BLOCK_N, KEPT, LANES)
    return tl.sum(e, 1), tl.sum(moment, 1), col_sum, col_moment


@triton.jit
def distance(total):
    """How many powers of two lie between a sum and 1, times 2^23; the most for 0, infinity and NaN."""
    return tl.abs(total.to(tl.int32, bitcast=True) - 0x3F800000)


@triton.jit
def row_distance(total, live, BLOCK_M: tl.constexpr, KEPT: tl.constexpr, LANES: tl.constexpr):
    """The largest distance of the live rows' sums; with KEPT that of every thread, [KEPT, LANES]."""
    far = tl.where(live, distance(total), 0)
    if KEPT == 0:
        return tl.max(far, 0)
    elif LANES == 32:
        return tl.max(tl.reshape(far, (BLOCK_M // (32 * KEPT), KEPT, 32)), 0)
    else:
        return tl.max(tl.max(tl.reshape(far, (BLOCK_M // (16 * KEPT), KEPT, 2, 8)), 2), 0)


@triton.jit
def store_columns(part, field, shift, total, moment, left, BLOCK_N: tl.constexpr, KEPT: tl.constexpr):
    """Stores the sums of a piece's first `left` columns; the largest distance of one."""
    if KEPT > 0:
        total, moment = tl.sum(tl.sum(total, 1), 0), tl.sum(tl.sum(moment, 1), 0)
    columns = tl.arange(0, BLOCK_N)
    store_triple(part, field, columns, total * 0 + shift, total, moment, columns < left)
    return tl.max(tl.where(columns < left, distance(total), 0), 0)


@triton.jit
def tiles_of(first, num_m, STRIP: tl.constexpr):
    """How many tiles a strip has; known to the compiler where it is one, which leaves no loop over them."""
    if STRIP == 1:
        return 1
    else:
        return tl.minimum(num_m - first, STRIP)


@triton.jit(do_not_specialize=["N", "M", "num_m", "num_n", "first_part"])
def info_nce_fwd_kernel(
    image, text, scale, image_norm, text_norm, labels, image_ids, text_ids, row_part, col_part, redo, positive,
    row_extra, col_extra, N, M, D, image_stride, text_stride, row0, num_m, num_n, first_part,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, STRIP: tl.constexpr,
    HAS_LABELS: tl.constexpr, HAS_IDS: tl.constexpr, HAS_POSITIVE: tl.constexpr, HAS_COLUMNS: tl.constexpr,
    HAS_EXTRAS: tl.constexpr, NORMALIZE: tl.constexpr, WIDE: tl.constexpr, PIECES: tl.constexpr, KEPT: tl.constexpr,
    LANES: tl.constexpr, WARP_GROUPS: tl.constexpr, TMA: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Rows row0 .. row0 + num_m BLOCK_M - 1 against all columns, by strips: STRIP row blocks of one column block.

    row_part [parts, 3, num_m BLOCK_M], part first_part + column block; col_part [strips, 3, num_n BLOCK_N].
    redo [strips, num_n]: 1 where a strip needs two exponentials. positive [N]: the similarity.
    row_extra, col_extra: (best, sum, number) of the negatives' x, laid out as the parts.
    """
    factor, factor_low = split_scale(scale)
    # So far below any logit that its exponential is 0, and finite: its moment is 0 as well.
    nowhere = tl.minimum(tl.maximum(-1e18 / factor, -3e38), 3e38)
    a = descriptor(image, N, D, image_stride, BLOCK_M, BLOCK_K, TMA)
    b = descriptor(text, M, D, text_stride, BLOCK_N, BLOCK_K, TMA)
    strips, row_field, col_field = tl.cdiv(num_m, STRIP), num_m * BLOCK_M, num_n * BLOCK_N
    PIECE: tl.constexpr = BLOCK_N // PIECES
    for item in range(tl.program_id(0), strips * num_n, tl.num_programs(0)):
        at, pn = grouped_order(item, strips, num_n, GROUP)
        n0, first = pn * BLOCK_N, at * STRIP
        columns = n0 + tl.arange(0, BLOCK_N)
        shift = 0.0
        col_sum, col_moment = no_sums(PIECE, KEPT, LANES), no_sums(PIECE, KEPT, LANES)
        if PIECES == 2:
            right_sum, right_moment = no_sums(PIECE, KEPT, LANES), no_sums(PIECE, KEPT, LANES)
        furthest = 0
        if KEPT > 0:
            furthest = tl.zeros((KEPT, LANES), tl.int32)
        for tile in tl.range(0, tiles_of(first, num_m, STRIP), disable_licm=True):
            pm = first + tile
            m0 = row0 + pm * BLOCK_M
            if KEPT > 0:
                tl.assume(D > 0)  # else the accumulator is zeroed twice, once for a loop without a trip
            acc = tile_dots(
                a, b, image_norm, text_norm, m0, n0, N, M, D, image_stride, text_stride, BLOCK_M, BLOCK_N, BLOCK_K,
                NORMALIZE, TMA, EVEN_K, PRECISION, STAGES,
            )  # fmt: skip
            rows = m0 + tl.arange(0, BLOCK_M)
            if PIECES == 1:
                acc = negatives_of(
                    acc, labels, image_ids, text_ids, positive, nowhere, m0, n0, N, M, HAS_LABELS, HAS_IDS,
                    HAS_POSITIVE, BLOCK_M, BLOCK_N, WARP_GROUPS,
                )  # fmt: skip
                if tile == 0:
                    shift = tl.floor(tl.max(tl.max(acc * factor, 1), 0) + 0.5)
                row_sum, row_moment, col_sum, col_moment = piece_sums(
                    acc, factor, factor_low, shift, col_sum, col_moment, BLOCK_M, BLOCK_N, KEPT, LANES, HAS_COLUMNS,
                    WIDE,
                )  # fmt: skip
            else:  # one piece of the columns after the other: fewer exponentials live at once
                left, right = column_halves(acc, BLOCK_M, BLOCK_N)
                left = negatives_of(
                    left, labels, image_ids, text_ids, positive, nowhere, m0, n0, N, M, HAS_LABELS, HAS_IDS,
                    HAS_POSITIVE, BLOCK_M, PIECE, WARP_GROUPS,
                )  # fmt: skip
                if tile == 0:
                    shift = tl.floor(tl.max(tl.max(left * factor, 1), 0) + 0.5)
                row_sum, row_moment, col_sum, col_moment = piece_sums(
                    left, factor, factor_low, shift, col_sum, col_moment, BLOCK_M, PIECE, KEPT, LANES, HAS_COLUMNS,
                    WIDE,
                )  # fmt: skip
                right = negatives_of(
                    right, labels, image_ids, text_ids, positive, nowhere, m0, n0 + PIECE, N, M, HAS_LABELS, HAS_IDS,
                    HAS_POSITIVE, BLOCK_M, PIECE, WARP_GROUPS,
                )  # fmt: skip
                more_sum, more_moment, right_sum, right_moment = piece_sums(
                    right, factor, factor_low, shift, right_sum, right_moment, BLOCK_M, PIECE, KEPT, LANES, HAS_COLUMNS,
                    WIDE,
                )  # fmt: skip
                row_sum, row_moment = row_sum + more_sum, row_moment + more_moment
            rows = m0 + tl.arange(0, BLOCK_M)
            row_at = (first_part + pn).to(tl.int64) * (3 * row_field) + pm * BLOCK_M + tl.arange(0, BLOCK_M)
            store_triple(row_part, row_field, row_at, row_sum * 0 + shift, row_sum, row_moment, None)
            furthest = tl.maximum(furthest, row_distance(row_sum, rows < N, BLOCK_M, KEPT, LANES))
            if HAS_EXTRAS:
                negative, _ = live_mask(
                    labels, image_ids, text_ids, rows, columns, N, M, HAS_LABELS, HAS_IDS, HAS_POSITIVE
                )
                best = tl.where(negative, acc * factor, float("-inf"))
                kept = tl.where(negative, acc * factor, 0.0)
                one = negative.to(tl.float32)
                store_triple(
                    row_extra, row_field, row_at, tl.max(best, 1), tl.sum(kept, 1), tl.sum(one, 1), None
                )
                if HAS_COLUMNS:  # a strip is one tile
                    col_at = pm.to(tl.int64) * (3 * col_field) + columns
                    store_triple(
                        col_extra, col_field, col_at, tl.max(best, 0), tl.sum(kept, 0), tl.sum(one, 0), columns < M
                    )
        if KEPT > 0:
            furthest = tl.max(tl.max(furthest, 0), 0)
        if HAS_COLUMNS:
            out = col_part + at.to(tl.int64) * (3 * col_field) + n0
            most = store_columns(out, col_field, shift, col_sum, col_moment, M - n0, PIECE, KEPT)
            furthest = tl.maximum(furthest, most)
            if PIECES == 2:
                most = store_columns(
                    out + PIECE, col_field, shift, right_sum, right_moment, M - n0 - PIECE, PIECE, KEPT
                )
                furthest = tl.maximum(furthest, most)
        fits = (furthest <= FURTHEST) & (tl.abs(shift) < 1e6)
        tl.store(redo + at.to(tl.int64) * num_n + pn, tl.where(fits, 0, 1).to(tl.int8))


@triton.jit(do_not_specialize=["parts", "n", "size"])
def info_nce_merge_kernel(
    part, extra, state, extra_state, parts, field, n, at, size,
    FIRST: tl.constexpr, HAS_EXTRAS: tl.constexpr, PLAIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merges part[:parts, :3, :n] in order into the running triples state[:3, at : at + n] of rows (or columns).

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
        here = tl.cast(p, tl.int64) * (3 * field) + i
        other_shift = tl.load(part + here, mask=mask, other=0.0)
        other_total = tl.load(part + field + here, mask=mask, other=0.0)
        other_moment = tl.load(part + 2 * field + here, mask=mask, other=0.0)
        if PLAIN:
            shift, total, moment = shift + other_shift, total + other_total, moment + other_moment
        else:
            shift, total, moment = merge_sums(shift, total, moment, other_shift, other_total, other_moment)
        if HAS_EXTRAS:
            best = tl.maximum(best, tl.load(extra + here, mask=mask, other=0.0))
            kept += tl.load(extra + field + here, mask=mask, other=0.0)
            live += tl.load(extra + 2 * field + here, mask=mask, other=0.0)
    store_triple(state, size, at + i, shift, total, moment, mask)
    if HAS_EXTRAS:
        store_triple(extra_state, size, at + i, best, kept, live, mask)


@triton.jit
def log1p(r):
    """log(1 + r) for r >= 0 in full relative precision: the rounding of 1 + r is divided out."""
    u = 1.0 + r
    return tl.where(u == 1.0, r, tl.log(u) * (r / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit(do_not_specialize=["n"])
def info_nce_finish_kernel(
    state, extra_state, positive, columns_of, scale, correct, n, smoothing,
    HAS_COLUMN: tl.constexpr, HAS_EXTRAS: tl.constexpr, HAS_STATS: tl.constexpr, SIGMOID: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Running triples in state[:3] -> the fields of InfoNceState, in fp64. In place.

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
    if SIGMOID:
        whole, rest, loss, dscale = shift, zero, total, moment
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
            tl.store(state + 4 * n + i, nll.to(tl.float32), mask=mask)
            tl.store(state + 5 * n + i, (smoothing / (live + 1.0)).to(tl.float32), mask=mask)
            loss += smoothing * above * 0.6931471805599453
            dscale += smoothing * above / factor
    if HAS_STATS:
        best = tl.load(extra_state + i, mask=mask, other=0.0)
        right = (loss == loss) & (factor.to(tl.float32) * dot > best)
        tl.store(correct + i, right.to(tl.uint8), mask=mask)
    tl.store(state + i, whole.to(tl.float32), mask=mask)
    tl.store(state + n + i, rest.to(tl.float32), mask=mask)
    tl.store(state + 2 * n + i, loss.to(tl.float32), mask=mask)
    tl.store(state + 3 * n + i, dscale.to(tl.float32), mask=mask)


@triton.jit(do_not_specialize=["n"])
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
