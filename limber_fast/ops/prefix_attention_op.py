"""`torch.ops.limber_fast.prefix_attention_fwd`: schema and fake kernel of the prefix_attention op.

The public function, with its documentation and argument checks, is `limber_fast.ops.prefix_attention.prefix_attention`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from limber_fast import dispatch
from limber_fast.ops import registration


class PrefixAttentionRequest(NamedTuple):
    """What a backend is told when it is asked whether it can run a call."""

    device: torch.device
    dtype: torch.dtype
    page_dtype: torch.dtype
    H: int
    D: int
    page_size: int


def _forward(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor, page_scales: Tensor | None, queries: Tensor, lengths: Tensor,
    page_table: Tensor, order: Tensor, shared: Tensor, private: Tensor, depth: int, positions: Tensor | None,
    rotary: Tensor | None, scale: float, backend: str,
) -> Tensor:  # fmt: skip
    request = PrefixAttentionRequest(q.device, q.dtype, pages.dtype, q.shape[1], q.shape[2], pages.shape[3])
    return dispatch.select("prefix_attention", request, backend).prefix_attention_fwd(
        q, k, v, pages, page_scales, queries, lengths, page_table, order, shared, private, depth, positions, rotary,
        scale=scale,
    )


def _forward_fake(
    q, k, v, pages, page_scales, queries, lengths, page_table, order, shared, private, depth, positions, rotary, scale,
    backend,
):  # fmt: skip
    return q.new_empty(q.shape)


registration.define(
    "prefix_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor(a!) pages, Tensor(b!)? page_scales, Tensor queries, "
    "Tensor lengths, Tensor page_table, Tensor order, Tensor shared, Tensor private, SymInt depth, Tensor? positions, "
    "Tensor? rotary, float scale, str backend) -> Tensor",
    _forward, _forward_fake,
    "prefix_attention: torch.vmap is not supported; a batch has sequences of its own: use those",
)  # fmt: skip
