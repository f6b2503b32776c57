"""project_concat: soft prompts projected straight into their rows of the embedded sequence, text gathered beside them.

Rows r are soft prompts, row r % k of image r // k; `positions` [rows] says where in the sequence they lie. The products
accumulate in fp32; bias, dropout and the cast are their epilogue. The dropout mask is a hash of (seed, row, column),
made anew wherever it is needed (limber_fast/reference/project_concat.py defines it). The gradient's rows are read in
place.
"""

from __future__ import annotations

import triton
import triton.language as tl

from limber_fast.kernels.common import descriptor, dot_rows, grouped_order

STEP = tl.constexpr(0x9E3779B97F4A7C15)


@triton.jit
def mix64(z):
    """splitmix64's finaliser."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def dropout_factors(start, rows, columns, threshold, factor):
    """[rows, columns] fp32: 0 where dropped, else `factor`. start: the finaliser of seed + STEP, as int64."""
    key = mix64(tl.cast(start, tl.uint64) + (rows + 1).to(tl.uint64) * STEP)[:, None]
    x = columns.to(tl.uint32)[None, :] + key.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) + (key >> 32).to(tl.uint32)
    x = x * 0x846CA68B
    x = x ^ (x >> 16)
    return tl.where(x.to(tl.int64) >= threshold, factor, 0.0)


@triton.jit(do_not_specialize=["rows", "tokens", "num_m", "tiles", "start", "threshold", "image_token_id"])
def project_concat_fwd_kernel(
    features, weight, bias, positions, input_ids, embedding, embedding_scales, out, rows, D, E, tokens, feature_stride,
    weight_stride, embedding_stride, image_token_id, start, threshold, factor, num_m, num_n,
    tiles, HAS_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_TEXT: tl.constexpr, HAS_SCALES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr,
    TMA: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Programs 0 .. tiles - 1 own one of num_m x num_n tiles of soft prompts each, the others TOKENS rows of text."""
    pid = tl.program_id(0)
    if pid < tiles:
        pm, pn = grouped_order(pid, num_m, num_n, GROUP)
        m0, n0 = pm * BLOCK_M, pn * BLOCK_N
        a = descriptor(features, rows, D, feature_stride, BLOCK_M, BLOCK_K, TMA)
        b = descriptor(weight, E, D, weight_stride, BLOCK_N, BLOCK_K, TMA)
        acc = dot_rows(
            a, b, m0, n0, rows, E, D, feature_stride, weight_stride, BLOCK_M, BLOCK_N, BLOCK_K, TMA, EVEN_K, PRECISION,
            STAGES,
        )  # fmt: skip
        r, e = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
        if HAS_BIAS:
            acc += tl.load(bias + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
        if HAS_DROPOUT:
            acc *= dropout_factors(start, r, e, threshold, factor)
        line = tl.load(positions + r, mask=r < rows, other=0) * E
        tl.store(
            out + line[:, None] + e[None, :], acc.to(out.dtype.element_ty), mask=(r < rows)[:, None] & (e < E)[None, :]
        )
    elif HAS_TEXT:
        t = (pid - tiles) * TOKENS + tl.arange(0, TOKENS)
        token = tl.load(input_ids + t, mask=t < tokens, other=image_token_id)
        text = token != image_token_id
        source = tl.where(text, token, 0) * embedding_stride
        if HAS_SCALES:
            scale = tl.load(embedding_scales + token, mask=text, other=0.0)
        for e0 in range(0, E, BLOCK_N):
            e = e0 + tl.arange(0, BLOCK_N)
            mask = text[:, None] & (e < E)[None, :]
            value = tl.load(embedding + source[:, None] + e[None, :], mask=mask, other=0.0).to(tl.float32)
            if HAS_SCALES:
                value *= scale[:, None]
            tl.store(out + t.to(tl.int64)[:, None] * E + e[None, :], value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def row_moments(x, line, E, eps, BLOCK: tl.constexpr):
    """(mean, 1 / standard deviation) of one row, in two passes."""
    total = tl.zeros((BLOCK,), tl.float32)
    for e0 in range(0, E, BLOCK):
        e = e0 + tl.arange(0, BLOCK)
        total += tl.load(x + line + e, mask=e < E, other=0.0).to(tl.float32)
    mean = tl.sum(total, 0) / E
    total = tl.zeros((BLOCK,), tl.float32)
    for e0 in range(0, E, BLOCK):
        e = e0 + tl.arange(0, BLOCK)
        centred = tl.where(e < E, tl.load(x + line + e, mask=e < E, other=0.0).to(tl.float32) - mean, 0.0)
        total += centred * centred
    return mean, 1.0 / tl.sqrt(tl.sum(total, 0) / E + eps)


@triton.jit
def project_concat_norm_kernel(
    out, positions, ln_weight, ln_bias, E, eps, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    """LayerNorm of the soft prompts where they lie; one program a row."""
    line = tl.load(positions + tl.program_id(0)) * E
    mean, rstd = row_moments(out, line, E, eps, BLOCK)
    for e0 in range(0, E, BLOCK):
        e = e0 + tl.arange(0, BLOCK)
        y = (tl.load(out + line + e, mask=e < E, other=0.0).to(tl.float32) - mean) * rstd
        if HAS_WEIGHT:
            y *= tl.load(ln_weight + e, mask=e < E, other=0.0)
        if HAS_BIAS:
            y += tl.load(ln_bias + e, mask=e < E, other=0.0)
        tl.store(out + line + e, y.to(out.dtype.element_ty), mask=e < E)


@triton.jit(do_not_specialize=["rows", "start", "threshold"])
def project_concat_norm_bwd_kernel(
    grad, places, prompts, ln_weight, weight_part, bias_part, rows, E, eps, start, threshold, factor,
    HAS_WEIGHT: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of the gradient through LayerNorm and dropout, over the soft prompts [rows, E] they belong to, in place.

    places [rows]: offset of each row's gradient. A program walks over every num_programs-th row, and sums what they
    give the norm's weight and bias in its own row of the parts.
    """
    pid, step = tl.program_id(0), tl.num_programs(0)
    if HAS_PARTS:
        for e0 in range(0, E, BLOCK):
            e = e0 + tl.arange(0, BLOCK)
            tl.store(weight_part + pid.to(tl.int64) * E + e, tl.zeros((BLOCK,), tl.float32), mask=e < E)
            tl.store(bias_part + pid.to(tl.int64) * E + e, tl.zeros((BLOCK,), tl.float32), mask=e < E)
    for r in range(pid, rows, step):
        line = tl.cast(r, tl.int64) * E
        place = tl.load(places + r)
        mean, rstd = row_moments(prompts, line, E, eps, BLOCK)
        along, level = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        for e0 in range(0, E, BLOCK):
            e = e0 + tl.arange(0, BLOCK)
            g = tl.load(grad + place + e, mask=e < E, other=0.0).to(tl.float32)
            unit = (tl.load(prompts + line + e, mask=e < E, other=0.0).to(tl.float32) - mean) * rstd
            if HAS_PARTS:
                at = pid.to(tl.int64) * E + e
                old = tl.load(weight_part + at, mask=e < E, other=0.0)
                tl.store(weight_part + at, old + g * unit, mask=e < E)
                tl.store(bias_part + at, tl.load(bias_part + at, mask=e < E, other=0.0) + g, mask=e < E)
            if HAS_WEIGHT:
                g *= tl.load(ln_weight + e, mask=e < E, other=0.0)
            along += tl.where(e < E, g * unit, 0.0)
            level += g
        along_mean, level_mean = tl.sum(along, 0) / E, tl.sum(level, 0) / E
        for e0 in range(0, E, BLOCK):
            e = e0 + tl.arange(0, BLOCK)
            g = tl.load(grad + place + e, mask=e < E, other=0.0).to(tl.float32)
            unit = (tl.load(prompts + line + e, mask=e < E, other=0.0).to(tl.float32) - mean) * rstd
            if HAS_WEIGHT:
                g *= tl.load(ln_weight + e, mask=e < E, other=0.0)
            g = (g - level_mean - unit * along_mean) * rstd
            if HAS_DROPOUT:
                row = tl.zeros((1,), tl.int32) + r
                g *= tl.reshape(dropout_factors(start, row, e, threshold, factor), (BLOCK,))
            tl.store(prompts + line + e, g.to(prompts.dtype.element_ty), mask=e < E)


@triton.jit
def gradient_tile(
    grad, places, r, e, rows, E, start, threshold, factor, HAS_DROPOUT: tl.constexpr
):
    """Rows r and columns e of the gradient, through dropout; zeros past the ends."""
    place = tl.load(places + r, mask=r < rows, other=0)
    mask = (r < rows)[:, None] & (e < E)[None, :]
    g = tl.load(grad + place[:, None] + e[None, :], mask=mask, other=0.0)
    if HAS_DROPOUT:
        g = (g.to(tl.float32) * dropout_factors(start, r, e, threshold, factor)).to(grad.dtype.element_ty)
    return g


@triton.jit(do_not_specialize=["rows", "start", "threshold"])
def project_concat_weight_kernel(
    grad, places, features, d_weight, d_bias, rows, D, E, feature_stride, start, threshold, factor, num_m, num_n,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """d_weight [E, D] = G^T features, one tile a program; the first column of tiles adds up d_bias as well."""
    pm, pn = grouped_order(tl.program_id(0), num_m, num_n, GROUP)
    e, d = pm * BLOCK_M + tl.arange(0, BLOCK_M), pn * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for r0 in tl.range(0, rows, BLOCK_K, num_stages=STAGES):
        r = r0 + tl.arange(0, BLOCK_K)
        g = gradient_tile(grad, places, r, e, rows, E, start, threshold, factor, HAS_DROPOUT)
        if HAS_BIAS:
            total += tl.sum(g.to(tl.float32), 0)
        if HAS_WEIGHT:
            mask = (r < rows)[:, None] & (d < D)[None, :]
            x = tl.load(features + r.to(tl.int64)[:, None] * feature_stride + d[None, :], mask=mask, other=0.0)
            acc = tl.dot(g.T, x, acc, input_precision=PRECISION)
    if HAS_WEIGHT:
        at = e.to(tl.int64)[:, None] * D + d[None, :]
        tl.store(d_weight + at, acc.to(d_weight.dtype.element_ty), mask=(e < E)[:, None] & (d < D)[None, :])
    if HAS_BIAS:
        tl.store(d_bias + e, total.to(d_bias.dtype.element_ty), mask=(e < E) & (pn == 0))


@triton.jit(do_not_specialize=["rows", "num_m", "start", "threshold"])
def project_concat_features_kernel(
    grad, places, weight, d_features, rows, D, E, weight_stride, start, threshold, factor, num_m, num_n,
    HAS_DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """d_features [rows, D] = G weight, one tile a program."""
    pm, pn = grouped_order(tl.program_id(0), num_m, num_n, GROUP)
    r, d = pm * BLOCK_M + tl.arange(0, BLOCK_M), pn * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for e0 in tl.range(0, E, BLOCK_K, num_stages=STAGES):
        e = e0 + tl.arange(0, BLOCK_K)
        g = gradient_tile(grad, places, r, e, rows, E, start, threshold, factor, HAS_DROPOUT)
        mask = (e < E)[:, None] & (d < D)[None, :]
        w = tl.load(weight + e.to(tl.int64)[:, None] * weight_stride + d[None, :], mask=mask, other=0.0)
        acc = tl.dot(g, w, acc, input_precision=PRECISION)
    at = r.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(d_features + at, acc.to(d_features.dtype.element_ty), mask=(r < rows)[:, None] & (d < D)[None, :])
