"""frozen_cross_entropy as dense torch ops on the labelled rows, some at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from limber_fast.backends.eager.int8_linear import dense_product, integers
from limber_fast.backends.eager.operands import wide

_ROWS = 256  # whose logits are held together


def frozen_cross_entropy_supports(request: Any) -> None:
    return None


def frozen_cross_entropy_fwd(
    hidden: Tensor, packed: Tensor, scales: Tensor, row_sums: Tensor, column_sums: Tensor, bias: Tensor | None,
    labels: Tensor, *, ignore_index: int, keep: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    losses = torch.zeros_like(wide(hidden[:, :0]).sum(1))
    gradient = torch.zeros_like(hidden) if keep else None
    dtype = torch.bfloat16 if hidden.dtype == torch.bfloat16 else losses.dtype
    q = integers(packed, len(scales), hidden.shape[1], dtype)
    for rows in (labels != ignore_index).nonzero()[:, 0].split(_ROWS):
        label = labels[rows][:, None]
        z = wide(dense_product(hidden[rows].to(dtype), q)) * scales
        if bias is not None:
            z += bias
        of_label = z.gather(1, label)
        excess = z.scatter(1, label, -torch.inf).logsumexp(1, keepdim=True) - of_label
        # A probability near 1 leaves its precision to what it lacks. NaN and +inf make NaN of the row.
        invalid = (z.isnan() | (z == torch.inf)).any(1, keepdim=True)
        losses[rows] = torch.nn.functional.softplus(excess).masked_fill(invalid, torch.nan)[:, 0]
        if gradient is not None:
            d_z = (z - z.logsumexp(1, keepdim=True)).exp()
            d_z.scatter_(1, label, -torch.sigmoid(excess)).masked_fill_(invalid, torch.nan)
            gradient[rows] = dense_product((d_z * scales).to(dtype), q.T).to(hidden.dtype)
    return losses, gradient


def frozen_cross_entropy_bwd(d_losses: Tensor, gradient: Tensor, labels: Tensor, *, ignore_index: int) -> Tensor:
    d_hidden = (wide(gradient) * d_losses[:, None]).to(gradient.dtype)
    return d_hidden.masked_fill_((labels == ignore_index)[:, None], 0)  # also where d_losses is not finite
