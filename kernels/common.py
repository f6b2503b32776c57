"""Pieces that several kernels share: tile order, streamed products, exact sums of powers of two."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def grouped_order(tile, num_m, num_n, GROUP: tl.constexpr):
    """(row block, column block) of a tile, GROUP row blocks at a time down the columns: their operands stay in L2."""
    width = GROUP * num_n
    first = (tile // width) * GROUP
    rows = tl.minimum(num_m - first, GROUP)
    return first + (tile % width) % rows, (tile % width) // rows


@triton.jit
def descriptor(base, rows, columns, stride, BLOCK_0: tl.constexpr, BLOCK_1: tl.constexpr, TMA: tl.constexpr):
    """A TMA descriptor of a row-major matrix, made once per program; without TMA the pointer itself."""
    if TMA:
        return tl.make_tensor_descriptor(base, [rows, columns], [stride, 1], [BLOCK_0, BLOCK_1])
    else:
        return base


@triton.jit
def dot_rows(
    a, b, a_row, b_row, a_rows, b_rows, D, a_stride, b_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    TMA: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Products [BLOCK_M, BLOCK_N] of rows of `a` and of `b` in fp32; D is streamed, never padded to a power of two.

    Rows past the end are zeros.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if TMA:
        for k in tl.range(0, D, BLOCK_K, num_stages=STAGES):
            acc = tl.dot(a.load([a_row, k]), b.load([b_row, k]).T, acc, input_precision=PRECISION)
    else:
        rm, rn, rk = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
        row_mask, column_mask = (rm < a_rows - a_row)[:, None], (rn < b_rows - b_row)[None, :]
        # A 64-bit base and 32-bit offsets within the tile: 64-bit pointer tensors cost hundreds of spilled registers.
        pa = a + a_row.to(tl.int64) * a_stride + (rm[:, None] * a_stride + rk[None, :])
        pb = b + b_row.to(tl.int64) * b_stride + (rn[None, :] * b_stride + rk[:, None])
        for k in tl.range(0, D, BLOCK_K, num_stages=STAGES):
            if EVEN_K:
                x = tl.load(pa + k, mask=row_mask, other=0.0)
                y = tl.load(pb + k, mask=column_mask, other=0.0)
            else:
                x = tl.load(pa + k, mask=row_mask & (rk[None, :] < D - k), other=0.0)
                y = tl.load(pb + k, mask=column_mask & (rk[:, None] < D - k), other=0.0)
            acc = tl.dot(x, y, acc, input_precision=PRECISION)
    return acc


@triton.jit
def column_halves(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of [BLOCK_M, BLOCK_N]; every element stays in its register."""
    return tl.split(tl.permute(tl.reshape(x, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def merge_sums(shift, total, moment, other_shift, other_total, other_moment):
    """Adds two sums of 2^(x - shift) and their moments, sums of 2^(x - shift) (x - shift); shifts are integers.

    An empty sum is 0 under any shift.
    """
    high = tl.where(
        total == 0.0, other_shift, tl.where(other_total == 0.0, shift, tl.maximum(shift, other_shift))
    )
    down = tl.where(total == 0.0, 0.0, shift - high)
    other_down = tl.where(other_total == 0.0, 0.0, other_shift - high)
    factor, other_factor = tl.exp2(down), tl.exp2(other_down)
    # A factor of 0 meets a finite distance only: shifts of finite sums are finite.
    moment = (moment + total * down) * factor + (other_moment + other_total * other_down) * other_factor
    return high, total * factor + other_total * other_factor, moment
