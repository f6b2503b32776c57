"""prefix_attention: rotary and append, attention over shared runs and over what a sequence reads alone, and the merge.

For what the CUDA extension does not take (fp32, other head dimensions and pages, no compiler when it was built). Tokens
are read in parts: a part is what lies within one split of SPLIT tokens and within one run of shared tokens, or past the
last of them. A program takes a tile of rows over one part, of a run the rows of all its members: weights under each
row's own running maximum, sums in fp32, weights rounded to the dtype of V for their product. It leaves the maximum (of
the logits over log 2), the sum of the weights and the weighted sum of V in slot split + depth of its rows (alone:
split + the most runs that a sequence has). No two parts of a row fall together, since later runs begin where earlier
ones end. The merge adds them up. No atomics, no order that depends on the schedule.

Which rows a program has follows from the tensors of `PagedBatch` on the device: nothing waits for the host. Counts that
change from step to step are not specialised: a new one compiles nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from limber_fast.kernels.common import LOG2E


@triton.jit
def last_at_most(starts, x, N, steps, BLOCK: tl.constexpr):
    """The last i < N with starts[i] <= x, of a number or of a block of them; steps: binary digits of N.

    BLOCK > 0: with starts[i] // BLOCK + i instead, where the tiles of BLOCK rows begin if each i may end in half a one.
    """
    low = x * 0
    high = low + N
    for _ in range(steps):
        middle = (low + high) // 2
        start = tl.load(starts + middle)
        before = (start // BLOCK + middle if BLOCK > 0 else start) <= x
        low, high = tl.where(before, middle, low), tl.where(before, high, middle)
    return low


@triton.jit
def rotated(x, rotary, d, D, position, ROTARY: tl.constexpr):
    """A row [D] with dimensions 0..ROTARY-1 turned pair by pair, in fp32."""
    value = tl.load(x + d, mask=d < D, other=0.0).to(tl.float32)
    if ROTARY > 0:
        turns, pair = d < ROTARY, d - d % 2
        partner = tl.load(x + (d ^ 1), mask=turns, other=0.0).to(tl.float32)
        angles = rotary + position.to(tl.int64) * ROTARY + pair
        cos, sin = tl.load(angles, mask=turns, other=1.0), tl.load(angles + 1, mask=turns, other=0.0)
        value = tl.where(turns, value * cos + tl.where(d % 2 == 0, -partner, partner) * sin, value)
    return value


@triton.jit
def in_int8(value):
    """A row as integers, rounded to nearest, and its scale, absmax / 127, or 0 where that is no normal number; NaN and
    zeros where the row is not finite."""
    scale = tl.max(tl.abs(value), 0) / 127.0 + tl.sum(value * 0.0, 0)
    scale = tl.where(scale < 1.1754944e-38, 0.0, scale)
    steps = value / tl.where(scale > 0.0, scale, 1.0)
    steps = (steps + 12582912.0) - 12582912.0  # 1.5 2^23: the sum keeps no fraction, and halves go to the even
    return tl.where(scale == scale, steps, 0.0).to(tl.int8), scale


@triton.jit(do_not_specialize=["table_width", "N", "steps"])
def prefix_attention_append_kernel(
    q, k, v, pages, page_scales, queries, lengths, page_table, positions, rotary, turned, q_stride, k_stride, v_stride,
    page_stride, scales_stride, table_width, N, steps, H, D, PAGE: tl.constexpr, ROTARY: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, SCALED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """turned [T, H, D] = rotated q; rotated k and v go to their places in the pages. A program per row and head."""
    row, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    n = last_at_most(queries, row, N, steps, 0)
    token = tl.load(lengths + n) - tl.load(queries + n + 1) + row
    position = tl.load(positions + row) if HAS_POSITIONS else token
    d = tl.arange(0, BLOCK_D)
    there, head = d < D, h * D
    value = rotated(q + row * q_stride + head, rotary, d, D, position, ROTARY)
    tl.store(turned + (row * H + h) * D + d, value.to(turned.dtype.element_ty), mask=there)
    page = tl.load(page_table + n * table_width + token // PAGE).to(tl.int64)
    in_page = 2 * h * PAGE + token % PAGE
    place = pages + page * page_stride + in_page * D + d
    key = rotated(k + row * k_stride + head, rotary, d, D, position, ROTARY).to(k.dtype.element_ty)
    value = tl.load(v + row * v_stride + head + d, mask=there, other=0.0)
    if SCALED:
        scale_place = page_scales + page * scales_stride + in_page
        key, key_scale = in_int8(key.to(tl.float32))
        value, value_scale = in_int8(value.to(tl.float32))
        tl.store(scale_place, key_scale)
        tl.store(scale_place + PAGE, value_scale)
    tl.store(place, key, mask=there)
    tl.store(place + PAGE * D, value, mask=there)


@triton.jit
def within(begin, end, split, SPLIT: tl.constexpr):
    """What of tokens begin .. end-1 lies in a split; SPLIT 0: there is one, of all tokens."""
    if SPLIT > 0:
        begin, end = tl.maximum(begin, split * SPLIT), tl.minimum(end, (split + 1) * SPLIT)
    return begin, end


@triton.jit
def attend(
    turned, pages, page_scales, table, part_sums, part_tops, part_totals, rows, valid, last, begin, end, h, H, D,
    page_stride, scales_stride, slot, slots, scale, PAGE: tl.constexpr, SCALED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attends rows [BLOCK_M] to tokens begin .. end-1 of a page table, each up to its `last`, and leaves the part."""
    d = tl.arange(0, BLOCK_D)
    at = rows.to(tl.int64) * H + h
    of_row = valid[:, None] & (d < D)[None, :]
    q = tl.load(turned + at[:, None] * D + d[None, :], mask=of_row, other=0.0)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    unit = 0.0  # of sums over int8 values: 2^-14 of their largest scale so far, weights are at most 2^14 in fp16
    for first in range(begin, end, BLOCK_N):
        token = first + tl.arange(0, BLOCK_N)
        there = token < end
        page = tl.load(table + token // PAGE, mask=there, other=0).to(tl.int64)
        in_page = 2 * h * PAGE + token % PAGE
        place = pages + page * page_stride + in_page * D
        scale_place = page_scales + page * scales_stride + in_page
        of_token = there[:, None] & (d < D)[None, :]
        keys = tl.load(place[:, None] + d[None, :], mask=of_token, other=0).to(q.dtype)
        logits = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2E)
        if SCALED:
            logits *= tl.load(scale_place, mask=there, other=0.0)[None, :]
        logits = tl.where(there[None, :] & (token[None, :] <= last[:, None]), logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))  # of the numbers: NaN reaches the sum
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weights, down = tl.exp2(logits - shift[:, None]), tl.exp2(top - shift)
        total, top = total * down + tl.sum(weights, 1), higher
        values = tl.load(place[:, None] + (PAGE * D + d)[None, :], mask=of_token, other=0).to(q.dtype)
        if SCALED:  # the weights: values that are scaled in registers spill
            value_scales = tl.load(scale_place + PAGE, mask=there, other=0.0)
            larger = tl.maximum(unit, tl.max(value_scales, 0) * 0.00006103515625)
            divisor = tl.where(larger > 0.0, larger, 1.0)
            weights *= (value_scales / divisor)[None, :]
            down *= unit / divisor
            unit = larger
        sums = tl.dot(weights.to(values.dtype), values, sums * down[:, None], input_precision=PRECISION)
    if SCALED:
        sums *= unit
    at = at * slots + slot
    tl.store(part_sums + at[:, None] * D + d[None, :], sums, mask=of_row)
    tl.store(part_tops + at, top, mask=valid)
    tl.store(part_totals + at, total, mask=valid)


@triton.jit(do_not_specialize=["N"])
def prefix_attention_starts_kernel(queries, order, starts, N, BLOCK: tl.constexpr):
    """starts [N + 1]: rows before the i-th sequence of `order`, counted in that order. One program."""
    before = 0
    for i0 in range(0, N, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        n = tl.load(order + i, mask=i < N, other=0)
        new = tl.where(i < N, tl.load(queries + n + 1) - tl.load(queries + n), 0)
        tl.store(starts + i, before + tl.cumsum(new, 0) - new, mask=i < N)
        before += tl.sum(new, 0)
    tl.store(starts + N, before)


@triton.jit(do_not_specialize=["table_width", "N", "steps", "tiles", "splits", "slots"])
def prefix_attention_shared_kernel(
    turned, pages, page_scales, queries, page_table, order, shared, starts, part_sums, part_tops, part_totals,
    page_stride, scales_stride, table_width, N, steps, H, D, tiles, splits, slots, scale, SPLIT: tl.constexpr,
    PAGE: tl.constexpr, SCALED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of the rows that a run's members bring together, all of which see all of it. Programs: runs * splits *
    tiles (of as many rows as there are at all), heads."""
    tile, h = tl.program_id(0) % tiles, tl.program_id(1).to(tl.int64)
    split, run = tl.program_id(0) // tiles % splits, tl.program_id(0) // tiles // splits
    first, end_member, depth = tl.load(shared + 5 * run), tl.load(shared + 5 * run + 1), tl.load(shared + 5 * run + 4)
    begin, end = within(tl.load(shared + 5 * run + 2), tl.load(shared + 5 * run + 3), split, SPLIT)
    row, end_row = tl.load(starts + first) + tile * BLOCK_M, tl.load(starts + end_member)
    if (begin < end) & (row < end_row):
        at = row + tl.arange(0, BLOCK_M)
        valid = at < end_row
        at = tl.where(valid, at, row)
        i = last_at_most(starts, at, N, steps, 0)
        rows = tl.load(queries + tl.load(order + i)) + at - tl.load(starts + i)
        table = page_table + tl.load(order + first).to(tl.int64) * table_width
        attend(
            turned, pages, page_scales, table, part_sums, part_tops, part_totals, rows, valid,
            end + tl.zeros_like(rows), begin, end, h, H, D, page_stride, scales_stride, split + depth, slots, scale,
            PAGE, SCALED, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["table_width", "N", "steps", "splits", "slots", "depth"])
def prefix_attention_alone_kernel(
    turned, pages, page_scales, queries, lengths, page_table, private, part_sums, part_tops, part_totals, page_stride,
    scales_stride, table_width, N, steps, H, D, splits, slots, depth, scale, SPLIT: tl.constexpr, PAGE: tl.constexpr,
    SCALED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of a sequence's rows over its own tokens, causal. Programs: splits * (T // BLOCK_M + N) tiles, heads."""
    tile, split, h = tl.program_id(0) // splits, tl.program_id(0) % splits, tl.program_id(1).to(tl.int64)
    n = last_at_most(queries, tile, N, steps, BLOCK_M).to(tl.int64)
    start, end_row, length = tl.load(queries + n), tl.load(queries + n + 1), tl.load(lengths + n)
    row = start + ((tile - start // BLOCK_M - n) * BLOCK_M).to(tl.int32)
    if row < end_row:
        rows = row + tl.arange(0, BLOCK_M)
        last = length - end_row + rows
        begin, end = within(tl.load(private + n), tl.minimum(length, length - end_row + row + BLOCK_M), split, SPLIT)
        if begin < end:
            attend(
                turned, pages, page_scales, page_table + n * table_width, part_sums, part_tops, part_totals, rows,
                rows < end_row, last, begin, end, h, H, D, page_stride, scales_stride, split + depth, slots, scale,
                PAGE, SCALED, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION,
            )  # fmt: skip


@triton.jit(do_not_specialize=["slots"])
def prefix_attention_merge_kernel(part_sums, part_tops, part_totals, out, D, slots, BLOCK_D: tl.constexpr):
    """out[row, h] from its parts; a slot whose sum is 0 holds none. A program per row and head."""
    at = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    there = d < D
    top = tl.full((), float("-inf"), tl.float32)
    for slot in range(slots):
        live = tl.load(part_totals + at * slots + slot) != 0.0
        top = tl.maximum(top, tl.where(live, tl.load(part_tops + at * slots + slot), float("-inf")))
    shift = tl.where(top == float("-inf"), 0.0, top)
    total, sums = tl.zeros((), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    for slot in range(slots):
        part = at * slots + slot
        weight = tl.load(part_totals + part)
        live = weight != 0.0  # NaN too
        factor = tl.where(live, tl.exp2(tl.load(part_tops + part) - shift), 0.0)
        total += weight * factor
        sums += tl.load(part_sums + part * D + d, mask=there & live, other=0.0) * factor
    tl.store(out + at * D + d, (sums / total).to(out.dtype.element_ty), mask=there)
