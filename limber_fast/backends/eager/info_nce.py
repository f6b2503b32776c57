"""info_nce with the N x M matrix of logits."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from limber_fast.backends.eager.operands import wide
from limber_fast.ops.info_nce import InfoNceState

NORM_EPS = 1e-12  # of torch.nn.functional.normalize


def info_nce_supports(request: Any) -> None:
    return None


def _unit(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows divided by max(norm, eps): in the dtype of x for products, and wide with the norms for the gradient."""
    norm = torch.linalg.vector_norm(wide(x), dim=1, keepdim=True)
    unit = wide(x) / norm.clamp_min(NORM_EPS)
    return unit.to(x.dtype), unit, norm


def _through_unit(gradient: Tensor, unit: Tensor, norm: Tensor) -> Tensor:
    """Gradient with respect to rows from the gradient with respect to unit rows; below eps the divisor is constant."""
    radial = unit * (gradient * unit).sum(1, keepdim=True)
    return (gradient - radial.masked_fill(norm < NORM_EPS, 0)) / norm.clamp_min(NORM_EPS)


def _columns(labels: Tensor | None, n: int, device: torch.device) -> Tensor:
    return torch.arange(n, device=device) if labels is None else labels.long()


def _masked(image_ids: Tensor | None, text_ids: Tensor | None, column: Tensor, width: int) -> Tensor | None:
    """Pairs that are neither positive nor negative: equal ids, except the positive itself. Extra negatives stay."""
    if image_ids is None:
        return None
    equal = image_ids[:, None] == text_ids[None, :]
    return F.pad(equal, (0, width - equal.shape[1])).scatter_(1, column[:, None], False)


def _similarities(image: Tensor, text: Tensor, extra: Tensor | None, cache: Tensor | None) -> Tensor:
    """image @ [text; extra].T, kept in the first bytes of the cache where it fits."""
    n, m, k = len(image), len(text), 0 if extra is None else len(extra)
    size = n * (m + k) * image.element_size()
    keep = cache is not None and cache.numel() >= size
    out = cache[:size].view(image.dtype).view(n, m + k) if keep else image.new_empty(n, m + k)
    if extra is None:
        return torch.mm(image, text.T, out=out)
    out[:, :m] = image @ text.T
    out[:, m:] = image @ extra.T
    return out


def _softmax_fields(
    s: Tensor, column: Tensor, masked: Tensor | None, scale: Tensor, label_smoothing: float, with_stats: bool
) -> tuple[Tensor, Tensor]:
    """The fields of InfoNceState for the rows of similarities s [R, C], and which rows are right."""
    x = s * scale
    if masked is not None:
        x.masked_fill_(masked, -math.inf)
    index = column[:, None]
    peak = x.amax(1, keepdim=True)
    z = x.sub_(peak)
    z_positive = z.gather(1, index)
    e = z.exp().scatter_(1, index, 0)
    others, e_positive = e.sum(1, keepdim=True), z_positive.exp()
    total = others + e_positive
    nll = torch.where(z_positive == 0, others.log1p(), total.log() - z_positive)

    s_positive = s.gather(1, index)
    d_scale = (e * (s - s_positive)).sum(1, keepdim=True) / total
    live = s.shape[1] if masked is None else s.shape[1] - masked.sum(1, keepdim=True)
    loss, smoothing = nll, []
    if label_smoothing:
        smoothing = [nll, torch.full_like(nll, label_smoothing) / live]
        margin = s - s_positive
        if masked is not None:
            margin.masked_fill_(masked, 0)
        mean_margin = margin.sum(1, keepdim=True) / live
        loss = nll - label_smoothing * scale * mean_margin
        d_scale = d_scale - label_smoothing * mean_margin

    # In double: at logits of 1e4 one float would leave 1e-3 of a nat.
    log_sum_exp = (peak.double() + total.double().log()) / math.log(2)
    exponent = log_sum_exp.round()
    remainder = log_sum_exp - exponent
    fields = torch.cat([exponent, remainder, loss, d_scale, *smoothing], dim=1).to(s.dtype).T.contiguous()
    if not with_stats:
        return fields, s.new_empty(0, dtype=torch.uint8)
    return fields, (z_positive > z.scatter(1, index, -math.inf).amax(1, keepdim=True))[:, 0].to(torch.uint8)


def _sigmoid_fields(
    s: Tensor, column: Tensor, masked: Tensor | None, scale: Tensor, bias: Tensor | None, with_stats: bool
) -> tuple[Tensor, Tensor]:
    x, index = s * scale, column[:, None]
    if bias is not None:
        x += bias
    loss, slope = F.softplus(x), torch.sigmoid(x)
    x_positive = x.gather(1, index)
    loss.scatter_(1, index, F.softplus(-x_positive))
    slope.scatter_(1, index, -torch.sigmoid(-x_positive))
    if masked is not None:
        loss.masked_fill_(masked, 0)
        slope.masked_fill_(masked, 0)
    fields = torch.stack([slope.sum(1), s.new_zeros(len(s)), loss.sum(1), (slope * s).sum(1)])
    if not with_stats:
        return fields, s.new_empty(0, dtype=torch.uint8)
    if masked is not None:
        x.masked_fill_(masked, -math.inf)
    return fields, (x_positive > x.scatter(1, index, -math.inf).amax(1, keepdim=True))[:, 0].to(torch.uint8)


def info_nce_fwd(
    image: Tensor, text: Tensor, extra_negatives: Tensor | None, logit_scale: Tensor, logit_bias: Tensor | None,
    labels: Tensor | None, image_ids: Tensor | None, text_ids: Tensor | None, *, label_smoothing: float,
    normalize: bool, variant: str, symmetric: bool, with_stats: bool, cache_bytes: int,
) -> InfoNceState:  # fmt: skip
    n, m = len(image), len(text)
    if normalize:
        image, text = _unit(image)[0], _unit(text)[0]
        extra_negatives = None if extra_negatives is None else _unit(extra_negatives)[0]
    cache = torch.empty(cache_bytes, dtype=torch.uint8, device=image.device)
    s = wide(_similarities(image, text, extra_negatives, cache))
    column = _columns(labels, n, image.device)
    masked = _masked(image_ids, text_ids, column, s.shape[1])
    if variant == "sigmoid":
        row, row_correct = _sigmoid_fields(s, column, masked, logit_scale, logit_bias, with_stats)
    else:
        row, row_correct = _softmax_fields(s, column, masked, logit_scale, label_smoothing, with_stats)
    if not symmetric:
        none_correct = torch.zeros(m if with_stats else 0, dtype=torch.uint8, device=image.device)
        return InfoNceState(row, s.new_zeros(len(row), m), row_correct, none_correct, cache)
    s, masked = s[:, :m].T, None if masked is None else masked[:, :m].T
    col, col_correct = _softmax_fields(s, column.argsort(), masked, logit_scale, label_smoothing, with_stats)
    return InfoNceState(row, col, row_correct, col_correct, cache)


def _softmax_slope(
    x: Tensor, positive: tuple[Tensor, Tensor], masked: Tensor | None, grad: Tensor, fields: Tensor,
    label_smoothing: float, whole: bool,
) -> Tensor:  # fmt: skip
    """d loss / d logits of the rows of x: grad * (p - (1 - eps) [positive] - eps / C [live]).

    positive: pairs of row and column of x. whole: x holds all logits of its rows; over a group of processes other ranks
    hold the rest, their positives too, and p comes from the state (digits are lost there from logits of 1e6 on).
    """
    exponent, remainder, loss, _, *smoothing = fields[:, :, None]
    nll, uniform = smoothing or (loss, None)
    if whole:
        p = x.softmax(1)
    else:  # the log-sum-exp as a float and its rounding error
        log_sum_exp = (exponent.double() + remainder) * math.log(2)
        rounded = log_sum_exp.to(x.dtype)
        p = (x - rounded).sub_((log_sum_exp - rounded).to(x.dtype)).exp_()
    p[positive] = nll[positive[0], 0].neg().expm1_()  # p - 1 without the cancellation
    if label_smoothing:
        p -= uniform if masked is None else uniform * ~masked
        p[positive] += label_smoothing
    return p.mul_(grad[:, None])


def _logit_gradient(
    s: Tensor, column: Tensor, masked: Tensor | None, scale: Tensor, bias: Tensor | None, row_grad: Tensor,
    col_grad: Tensor | None, state: InfoNceState, variant: str, label_smoothing: float, m: int,
) -> Tensor:  # fmt: skip
    x = s * scale
    if variant == "sigmoid":
        if bias is not None:
            x += bias
        slope = torch.sigmoid(x).scatter_(1, column[:, None], -torch.sigmoid(-x.gather(1, column[:, None])))
        if masked is not None:
            slope.masked_fill_(masked, 0)
        return slope.mul_(row_grad[:, None])
    if masked is not None:
        x.masked_fill_(masked, -math.inf)
    row = torch.arange(len(x), device=x.device)
    ds = _softmax_slope(x, (row, column), masked, row_grad, state.row, label_smoothing, True)
    if col_grad is not None:
        masked = None if masked is None else masked[:, :m].T
        ds[:, :m] += _softmax_slope(
            x[:, :m].T, (column, row), masked, col_grad, state.col, label_smoothing, len(x) == m
        ).T
    return ds


def info_nce_bwd(
    image: Tensor, text: Tensor, extra_negatives: Tensor | None, logit_scale: Tensor, logit_bias: Tensor | None,
    labels: Tensor | None, image_ids: Tensor | None, text_ids: Tensor | None, row_grad: Tensor,
    col_grad: Tensor | None, state: InfoNceState, *, label_smoothing: float, normalize: bool, variant: str,
    symmetric: bool, need_image: bool, need_text: bool, need_extra: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    m, dtype, towers = len(text), image.dtype, (image, text, extra_negatives)
    units = [_unit(x) if normalize and x is not None else (x, None, None) for x in towers]
    image, text, extra_negatives = (unit[0] for unit in units)
    width = m + (0 if extra_negatives is None else len(extra_negatives))
    size = len(image) * width * image.element_size()
    if state.cache.numel() >= size:
        s = state.cache[:size].view(dtype).view(len(image), width)
    else:
        s = _similarities(image, text, extra_negatives, None)
    column = _columns(labels, len(image), image.device)
    masked = _masked(image_ids, text_ids, column, width)
    ds = _logit_gradient(wide(s), column, masked, logit_scale, logit_bias, row_grad, col_grad, state, variant,
                         label_smoothing, m)  # fmt: skip
    ds = ds.mul_(logit_scale).to(dtype)

    gradients: list[Tensor | None] = [None, None, None]
    if need_image:
        gradients[0] = ds[:, :m] @ text
        if extra_negatives is not None:
            gradients[0] += ds[:, m:] @ extra_negatives
    if need_text:
        gradients[1] = ds[:, :m].T @ image
    if need_extra:
        gradients[2] = ds[:, m:].T @ image
    if normalize:
        for i, (_, unit, norm) in enumerate(units):
            if gradients[i] is not None:
                gradients[i] = _through_unit(wide(gradients[i]), unit, norm).to(dtype)
    return tuple(gradients)
