"""frozen_cross_entropy: tensors to the parameters of csrc/params/frozen_cross_entropy.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from limber_fast import native
from limber_fast.backends.cpu.int8_linear import MOST_REDUCED
from limber_fast.backends.cpu.tensors import DTYPES, address, threads, unknown_dtype


def frozen_cross_entropy_supports(request: Any) -> str | None:
    if reason := unknown_dtype(request.dtype):
        return reason
    if request.D > MOST_REDUCED:
        return f"sums at most {MOST_REDUCED} products exactly; got {request.D}"
    native.cpu()
    return None


def _params(kernels: Any, labels: Tensor, ignore_index: int, rows: Tensor, d_hidden: Tensor | None) -> Any:
    return kernels.FrozenCrossEntropyParams(
        M=len(rows), D=rows.shape[1], dtype=DTYPES[rows.dtype], labels=labels.data_ptr(), ignore_index=ignore_index,
        d_hidden=address(d_hidden), threads=threads(),
    )  # fmt: skip


def frozen_cross_entropy_fwd(
    hidden: Tensor, packed: Tensor, scales: Tensor, row_sums: Tensor, column_sums: Tensor, bias: Tensor | None,
    labels: Tensor, *, ignore_index: int, keep: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    losses = torch.empty(len(hidden), dtype=torch.float32)
    gradient = torch.empty(hidden.shape, dtype=hidden.dtype) if keep else None
    kernels = native.cpu()
    kernels.frozen_cross_entropy_fwd(
        _params(kernels, labels, ignore_index, hidden, gradient), address(hidden), hidden.stride(0), len(scales),
        packed.data_ptr(), scales.data_ptr(), row_sums.data_ptr(), column_sums.data_ptr(), address(bias),
        losses.data_ptr(),
    )  # fmt: skip
    return losses, gradient


def frozen_cross_entropy_bwd(d_losses: Tensor, gradient: Tensor, labels: Tensor, *, ignore_index: int) -> Tensor:
    d_hidden = torch.empty_like(gradient)
    kernels = native.cpu()
    params = _params(kernels, labels, ignore_index, gradient, d_hidden)
    kernels.frozen_cross_entropy_bwd(params, address(gradient), d_losses.data_ptr())
    return d_hidden
