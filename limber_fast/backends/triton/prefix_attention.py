"""prefix_attention: tensors to the launchers of kernels/prefix_attention_launch.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from limber_fast.backends.triton import device

_DIMENSIONS, _MOST_DIMENSIONS = 16, 256  # a product's depth; a row of V and its sums stay in registers


def prefix_attention_supports(request: Any) -> str | None:
    if request.D % _DIMENSIONS or request.D > _MOST_DIMENSIONS:
        return f"takes heads of {_DIMENSIONS}, {2 * _DIMENSIONS}, ... {_MOST_DIMENSIONS} dimensions; got {request.D}"
    if request.page_dtype == torch.int8 and request.dtype == torch.float32:
        return "takes int8 pages beside rows of 16 bits; got torch.float32"  # their products in fp32 spill
    return device.refusal(request.device, request.dtype)


@device.guarded
def prefix_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor, page_scales: Tensor | None, queries: Tensor, lengths: Tensor,
    page_table: Tensor, order: Tensor, shared: Tensor, private: Tensor, depth: int, positions: Tensor | None,
    rotary: Tensor | None, *, scale: float,
) -> Tensor:  # fmt: skip
    from limber_fast.kernels import prefix_attention_launch as launch

    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if len(q):
        launch.prefix_attention_fwd(
            q, k, v, pages, page_scales, queries, lengths, page_table, order, shared, private, depth, positions, rotary,
            out, scale=scale, precision=device.precision(),
        )  # fmt: skip
    return out
