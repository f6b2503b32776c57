"""InfoNCE in dense, differentiable PyTorch: the formula and nothing else, in whatever dtype the towers have."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _softmax_rows(x: Tensor, positive: Tensor, live: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """Per row of logits x [R, C]: cross entropy with the positive column, and log-sum-exp over live columns.

    Written in margins x - x_positive: loss = log(1 + sum over the others of exp(margin)) keeps its relative
    precision when it is small, where log-sum-exp minus x_positive would cancel.
    """
    margin = x - x.gather(1, positive[:, None])
    others = live.scatter(1, positive[:, None], False)
    # The lowest finite number, not -inf: a row whose only candidate is its positive has loss 0 and gradient 0, not NaN.
    excess = margin.masked_fill(~others, torch.finfo(x.dtype).min).logsumexp(1)
    nll = torch.logaddexp(excess, torch.zeros_like(excess))
    smoothing = margin.masked_fill(~live, 0).sum(1) / live.sum(1)
    return nll - label_smoothing * smoothing, nll + x.gather(1, positive[:, None])[:, 0]


def _top1(x: Tensor, positive: Tensor, live: Tensor) -> Tensor:
    others = x.masked_fill(~live.scatter(1, positive[:, None], False), -torch.inf)
    return x.gather(1, positive[:, None])[:, 0] > others.amax(1)


def info_nce(
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    *,
    logit_bias: float | Tensor | None = None,
    labels: Tensor | None = None,
    ids: Tensor | tuple[Tensor, Tensor] | None = None,
    extra_negatives: Tensor | None = None,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    normalize: bool = False,
    variant: str = "softmax",
    symmetric: bool = True,
    reduction: str = "mean",
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The loss of `limber_fast.info_nce` and its statistics, from the N x (M + K) matrix of logits."""
    n, m = image.shape[0], text.shape[0]
    candidates = text if extra_negatives is None else torch.cat([text, extra_negatives])
    if normalize:
        image, candidates = F.normalize(image, dim=1), F.normalize(candidates, dim=1)
    x = logit_scale * (image @ candidates.T) + (0.0 if logit_bias is None else logit_bias)

    column = torch.arange(n, device=x.device) if labels is None else labels.long()
    is_positive = F.one_hot(column, x.shape[1]).bool()
    live = torch.ones_like(is_positive)
    if ids is not None:
        image_ids, text_ids = ids if isinstance(ids, (tuple, list)) else (ids, ids)
        live[:, :m] = image_ids[:, None] != text_ids[None, :]
        live |= is_positive

    stats: dict[str, Tensor | None] = {"image_log_sum_exp": None, "text_log_sum_exp": None, "text_accuracy": None}
    stats["image_accuracy"] = _top1(x, column, live).to(x.dtype).mean()
    if variant == "sigmoid":
        sign = torch.where(is_positive, 1.0, -1.0).to(x.dtype)
        loss = (-F.logsigmoid(sign * x)).masked_fill(~live, 0).sum(1)
    else:
        loss, stats["image_log_sum_exp"] = _softmax_rows(x, column, live, label_smoothing)
        if symmetric:
            row = column.argsort()
            xt, live_t = x[:, :m].T, live[:, :m].T
            text_loss, stats["text_log_sum_exp"] = _softmax_rows(xt, row, live_t, label_smoothing)
            stats["text_accuracy"] = _top1(xt, row, live_t).to(x.dtype).mean()
            loss = (loss + text_loss[column]) / 2
    stats["loss_per_row"] = loss
    weight = torch.ones_like(loss) if weights is None else weights.to(loss.dtype)
    weighted = weight * loss
    if reduction == "mean":
        return weighted.sum() / weight.sum(), stats
    return weighted.sum() if reduction == "sum" else weighted, stats
