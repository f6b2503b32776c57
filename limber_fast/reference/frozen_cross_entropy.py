"""Cross entropy through a frozen int8 head in plain, differentiable PyTorch, from the whole matrix of logits."""

from __future__ import annotations

import torch
from torch import Tensor


def frozen_cross_entropy(
    hidden: Tensor,
    q: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """The formula of `limber_fast.frozen_cross_entropy` in the dtype of `hidden`."""
    z = (hidden @ q.to(hidden.dtype).T) * scales.to(hidden.dtype)
    if bias is not None:
        z = z + bias.to(hidden.dtype)
    labelled = labels != ignore_index
    label = labels.masked_fill(~labelled, 0).long()[..., None]
    # log(1 + sum over the others of e^(z - z_label)), which keeps its precision where it is nearly 0. The lowest finite
    # number, not -inf: with a vocabulary of one token the loss is 0 and so is its gradient.
    margin = z - z.gather(-1, label)
    others = torch.zeros_like(z, dtype=torch.bool).scatter(-1, label, True)
    excess = margin.masked_fill(others, torch.finfo(z.dtype).min).logsumexp(-1)
    losses = torch.logaddexp(excess, torch.zeros_like(excess)).masked_fill(~labelled, 0)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / labelled.sum()
