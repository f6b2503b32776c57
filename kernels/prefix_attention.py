"""prefix_attention: rotary and append, attention over shared runs and over what a sequence reads alone, and the merge.

For what the CUDA extension does not take (fp32, other head dimensions and pages, no compiler when it was built). Tokens
are read in parts: a part is what lies within one split of SPLIT tokens and within one run of shared tokens, or past the
last of them. A program takes a tile of rows over one part: weights under the tile's own running maximum, products and
sums in fp32. It leaves the maximum (of the logits over log 2), the sum of the weights and the weighted sum of V in slot
split + run of its rows (alone: split + number of runs), of which no two parts of a row fall together, since later runs
begin where earlier ones end. The merge adds them up. No atomics, no order that depends on the schedule.

Which rows a program has follows from the tensors of `PagedBatch` on the device: nothing waits for the host.
"""

from __future__ import annotations

import triton
import triton.language as tl

from limber_fast.kernels.common import LOG2E


@triton.jit
def owner_of(queries, row, N):
    """The sequence that brings `row`: the last n with queries[n] <= row."""
    low, high = 0, N
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(queries + middle) <= row
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
def prefix_attention_append_kernel(
    q, k, v, pages, queries, lengths, page_table, positions, rotary, turned, q_stride, k_stride, v_stride, page_stride,
    table_width, N, H, D, PAGE: tl.constexpr, ROTARY: tl.constexpr, HAS_POSITIONS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """turned [T, H, D] = rotated q; rotated k and v go to their places in the pages. A program per row and head."""
    row, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    n = owner_of(queries, row, N)
    token = tl.load(lengths + n) - tl.load(queries + n + 1) + row
    position = tl.load(positions + row) if HAS_POSITIONS else token
    d = tl.arange(0, BLOCK_D)
    there, head = d < D, h * D
    value = rotated(q + row * q_stride + head, rotary, d, D, position, ROTARY)
    tl.store(turned + (row * H + h) * D + d, value.to(turned.dtype.element_ty), mask=there)
    page = tl.load(page_table + n.to(tl.int64) * table_width + token // PAGE).to(tl.int64)
    place = pages + page * page_stride + (2 * h * PAGE + token % PAGE) * D + d
    value = rotated(k + row * k_stride + head, rotary, d, D, position, ROTARY)
    tl.store(place, value.to(pages.dtype.element_ty), mask=there)
    tl.store(place + PAGE * D, tl.load(v + row * v_stride + head + d, mask=there, other=0.0), mask=there)


@triton.jit
def within(begin, end, split, SPLIT: tl.constexpr):
    """What of tokens begin .. end-1 lies in a split; SPLIT 0: there is one, of all tokens."""
    if SPLIT > 0:
        begin, end = tl.maximum(begin, split * SPLIT), tl.minimum(end, (split + 1) * SPLIT)
    return begin, end


@triton.jit
def attend(
    turned, pages, table, part_sums, part_tops, part_totals, rows, valid, last, begin, end, h, H, D, page_stride, slot,
    slots, scale, PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Attends rows [BLOCK_M] to tokens begin .. end-1 of a page table, each up to its `last`, and leaves the part."""
    d = tl.arange(0, BLOCK_D)
    at = rows.to(tl.int64) * H + h
    of_row = valid[:, None] & (d < D)[None, :]
    q = tl.load(turned + at[:, None] * D + d[None, :], mask=of_row, other=0.0)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(begin, end, BLOCK_N):
        token = first + tl.arange(0, BLOCK_N)
        there = token < end
        page = tl.load(table + token // PAGE, mask=there, other=0).to(tl.int64)
        place = pages + page * page_stride + (2 * h * PAGE + token % PAGE) * D
        of_token = there[:, None] & (d < D)[None, :]
        keys = tl.load(place[:, None] + d[None, :], mask=of_token, other=0.0)
        logits = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2E)
        logits = tl.where(there[None, :] & (token[None, :] <= last[:, None]), logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))  # of the numbers: NaN reaches the sum
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weights, down = tl.exp2(logits - shift[:, None]), tl.exp2(top - shift)
        values = tl.load(place[:, None] + (PAGE * D + d)[None, :], mask=of_token, other=0.0)
        sums = tl.dot(weights.to(values.dtype), values, sums * down[:, None], input_precision=PRECISION)
        total, top = total * down + tl.sum(weights, 1), higher
    at = at * slots + slot
    tl.store(part_sums + at[:, None] * D + d[None, :], sums, mask=of_row)
    tl.store(part_tops + at, top, mask=valid)
    tl.store(part_totals + at, total, mask=valid)


@triton.jit
def prefix_attention_shared_kernel(
    turned, pages, queries, page_table, order, shared, part_sums, part_tops, part_totals, page_stride, table_width, H,
    D, splits, slots, member_tiles, strides, scale, SPLIT: tl.constexpr, PAGE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A run's members in tiles of BLOCK_M; of each their i-th rows, i = stride, stride + strides, ..., all of which see
    all of the run. Programs: member_tiles * strides, heads, runs * splits."""
    tile, stride = tl.program_id(0) % member_tiles, tl.program_id(0) // member_tiles
    h, run, split = tl.program_id(1).to(tl.int64), tl.program_id(2) // splits, tl.program_id(2) % splits
    first, end_member = tl.load(shared + 4 * run), tl.load(shared + 4 * run + 1)
    begin, end = within(tl.load(shared + 4 * run + 2), tl.load(shared + 4 * run + 3), split, SPLIT)
    member = first + tile * BLOCK_M + tl.arange(0, BLOCK_M)
    is_member = member < end_member
    if (begin < end) & (first + tile * BLOCK_M < end_member):
        n = tl.load(order + member, mask=is_member, other=0)
        row = tl.load(queries + n, mask=is_member, other=0)
        new = tl.load(queries + n + 1, mask=is_member, other=0) - row
        table = page_table + tl.load(order + first).to(tl.int64) * table_width
        for i in range(stride, tl.max(new, 0), strides):
            attend(
                turned, pages, table, part_sums, part_tops, part_totals, row + i, i < new, end + tl.zeros_like(row),
                begin, end, h, H, D, page_stride, split + run, slots, scale, PAGE, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION,
            )  # fmt: skip


@triton.jit
def prefix_attention_alone_kernel(
    turned, pages, queries, lengths, page_table, private, part_sums, part_tops, part_totals, page_stride, table_width,
    H, D, splits, slots, runs, scale, SPLIT: tl.constexpr, PAGE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of a sequence's rows over its own tokens, causal. Programs: row tiles of the longest that could be, heads,
    sequences * splits."""
    tile, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n, split = (tl.program_id(2) // splits).to(tl.int64), tl.program_id(2) % splits
    row, end_row, length = tl.load(queries + n) + tile * BLOCK_M, tl.load(queries + n + 1), tl.load(lengths + n)
    if row < end_row:
        rows = row + tl.arange(0, BLOCK_M)
        last = length - end_row + rows
        begin, end = within(tl.load(private + n), tl.minimum(length, length - end_row + row + BLOCK_M), split, SPLIT)
        if begin < end:
            attend(
                turned, pages, page_table + n * table_width, part_sums, part_tops, part_totals, rows, rows < end_row,
                last, begin, end, h, H, D, page_stride, split + runs, slots, scale, PAGE, BLOCK_M, BLOCK_N, BLOCK_D,
                PRECISION,
            )  # fmt: skip


@triton.jit
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
