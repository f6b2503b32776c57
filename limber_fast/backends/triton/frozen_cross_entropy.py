"""frozen_cross_entropy: tensors to the launchers of kernels/frozen_cross_entropy_launch.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from limber_fast.backends.triton import device
from limber_fast.backends.triton.int8_linear import weight_on_device


def frozen_cross_entropy_supports(request: Any) -> str | None:
    return device.refusal(request.device, request.dtype)


@device.guarded
def frozen_cross_entropy_fwd(
    hidden: Tensor, packed: Tensor, scales: Tensor, row_sums: Tensor, column_sums: Tensor, bias: Tensor | None,
    labels: Tensor, *, ignore_index: int, keep: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    from limber_fast.kernels import frozen_cross_entropy_launch as launch

    losses = torch.zeros(len(hidden), dtype=torch.float32, device=hidden.device)
    gradient = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device) if keep else None
    rows = (labels != ignore_index).nonzero()[:, 0]
    if len(rows):
        weight = weight_on_device(packed, scales, row_sums, hidden.shape[1])
        launch.frozen_cross_entropy_fwd(hidden[rows], weight, bias, labels[rows], rows, losses, gradient)
    return losses, gradient


@device.guarded
def frozen_cross_entropy_bwd(d_losses: Tensor, gradient: Tensor, labels: Tensor, *, ignore_index: int) -> Tensor:
    from limber_fast.kernels import frozen_cross_entropy_launch as launch

    d_hidden = torch.empty_like(gradient)
    if len(gradient):
        launch.frozen_cross_entropy_bwd(d_losses, gradient, labels, d_hidden, ignore_index=ignore_index)
    return d_hidden
