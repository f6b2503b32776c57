"""frozen_cross_entropy: logits chunk by chunk of the vocabulary, one softmax over all of them, and its gradient.

The products are int8_linear's. Per row a running maximum of the logits *other than the label's*, their sum of
exponentials under it and the label's logit: the loss is log(1 + e^excess) with excess = log sum over the others
e^(z - z_label), which keeps its precision where it is nearly 0, and so does the gradient
sigmoid(excess) (sum over the others p s q - s_label q_label), p their own softmax. Exponentials are powers of 2, all
sums fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from limber_fast.kernels.common import LOG2E


@triton.jit
def logits_of(z, labels, row, first, c, C):
    """A row's logits of this chunk over log 2, -inf past the end, and which of them is the label's."""
    value = tl.load(z + row * C + c, mask=c < C, other=float("-inf")) * LOG2E
    return value, c + first == tl.load(labels + row)


@triton.jit
def frozen_cross_entropy_chunk_kernel(
    z, labels, scales, lift, state, g, factor, first, R, C, padded, FIRST: tl.constexpr, HAS_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Takes logits z [R, C] of the tokens from `first` on into state [3, R]: maximum, sum and the label's logit, in
    units of log 2; a sum of NaN says that a logit was NaN or +inf. One program per row.

    HAS_GRAD: g [R, padded] = 2^(z - maximum) s lift over the others, and factor [R], what sums under the old maximum
    are multiplied by.
    """
    row = tl.program_id(0).to(tl.int64)
    old, total, of_label = float("-inf"), 0.0, float("-inf")
    if not FIRST:
        old = tl.load(state + row)
        total, of_label = tl.load(state + R + row), tl.load(state + 2 * tl.cast(R, tl.int64) + row)
    highest, label_here, invalid = tl.zeros((BLOCK,), tl.float32) + old, tl.zeros((BLOCK,), tl.float32) + of_label, 0
    for c0 in range(0, C, BLOCK):
        value, is_label = logits_of(z, labels, row, first, c0 + tl.arange(0, BLOCK), C)
        bad = (value != value) | (value == float("inf"))
        highest = tl.maximum(highest, tl.where(is_label | bad, float("-inf"), value))
        label_here = tl.maximum(label_here, tl.where(is_label, value, float("-inf")))
        invalid = tl.maximum(invalid, tl.max(bad.to(tl.int32), 0))
    top, of_label = tl.max(highest, 0), tl.max(label_here, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    down = 1.0 if FIRST else tl.exp2(old - shift)  # 0 where nothing came before
    sums = tl.zeros((BLOCK,), tl.float32)
    by = tl.load(lift) if HAS_GRAD else 0.0
    for c0 in range(0, padded, BLOCK):
        c = c0 + tl.arange(0, BLOCK)
        value, is_label = logits_of(z, labels, row, first, c, C)
        e = tl.where(is_label, 0.0, tl.exp2(value - shift))
        sums += e
        if HAS_GRAD:
            weighted = e * (tl.load(scales + c, mask=c < C, other=0.0) * by)
            tl.store(g + row * padded + c, weighted.to(g.dtype.element_ty), mask=c < padded)
    total = tl.where(invalid > 0, float("nan"), total * down + tl.sum(sums, 0))
    tl.store(state + row, top)
    tl.store(state + R + row, total)
    tl.store(state + 2 * tl.cast(R, tl.int64) + row, of_label)
    if HAS_GRAD:
        tl.store(factor + row, down)


@triton.jit
def frozen_cross_entropy_finish_kernel(
    state, sums, rows, labels, w, scales, lift, losses, gradient, R, D, w_stride, HAS_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """losses[rows[r]], and gradient[rows[r], :D] from sums [R, D] of the others' lifted products. A program per row."""
    r = tl.program_id(0).to(tl.int64)
    top, total = tl.load(state + r), tl.load(state + R + r)
    # In units of log 2. No others at all: -inf, unless the label's logit is -inf as well, as in eager.
    excess = top + tl.log2(total) - tl.load(state + 2 * tl.cast(R, tl.int64) + r)
    small = tl.exp2(-tl.abs(excess))
    # log2(1 + small), to the last digit where 1 + small loses small's own.
    sum_of_both = 1.0 + small
    rest = tl.where(sum_of_both == 1.0, small * LOG2E, tl.log2(sum_of_both) * (small / (sum_of_both - 1.0)))
    loss = (tl.maximum(excess, 0.0) + rest) / LOG2E
    row = tl.load(rows + r)
    tl.store(losses + row, tl.where(excess == excess, loss, float("nan")))
    if HAS_GRAD:
        p = tl.where(excess > 0.0, 1.0, small) / (1.0 + small)
        p = tl.where(excess == excess, p, float("nan"))
        share = p / (tl.where(total == 0.0, 1.0, total) * tl.load(lift))
        label = tl.load(labels + r)
        of_label = p * tl.load(scales + label)
        for d0 in range(0, D, BLOCK):
            d = d0 + tl.arange(0, BLOCK)
            q = tl.load(w + label * w_stride + d, mask=d < D, other=0).to(tl.float32)
            value = share * tl.load(sums + r * D + d, mask=d < D, other=0.0) - of_label * q
            tl.store(gradient + row * D + d, value.to(gradient.dtype.element_ty), mask=d < D)


@triton.jit
def frozen_cross_entropy_bwd_kernel(
    d_losses, gradient, labels, d_hidden, ignore_index, D, BLOCK: tl.constexpr
):
    """d_hidden [M, D] = d_losses gradient; zeros without a label, whatever d_losses holds. A program per row."""
    row = tl.program_id(0).to(tl.int64)
    labelled = tl.load(labels + row) != ignore_index
    by = tl.load(d_losses + row)
    for d0 in range(0, D, BLOCK):
        d = d0 + tl.arange(0, BLOCK)
        value = tl.load(gradient + row * D + d, mask=d < D, other=0.0).to(tl.float32) * by
        tl.store(d_hidden + row * D + d, tl.where(labelled, value, 0.0).to(d_hidden.dtype.element_ty), mask=d < D)
