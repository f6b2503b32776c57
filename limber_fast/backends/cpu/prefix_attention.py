"""prefix_attention: tensors to the parameters of csrc/params/prefix_attention.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from limber_fast import native
from limber_fast.backends.cpu.tensors import DTYPES, address, threads, unknown_dtype

_DIMENSIONS, _MOST_DIMENSIONS = 16, 256  # a vector of the widest instruction set; MAX_HEAD_DIM


def prefix_attention_supports(request: Any) -> str | None:
    if reason := unknown_dtype(request.dtype):
        return reason
    if request.D % _DIMENSIONS or request.D > _MOST_DIMENSIONS:
        return f"takes heads of {_DIMENSIONS}, {2 * _DIMENSIONS}, ... {_MOST_DIMENSIONS} dimensions; got {request.D}"
    native.cpu()
    return None


def prefix_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor, page_scales: Tensor | None, queries: Tensor, lengths: Tensor,
    page_table: Tensor, order: Tensor, shared: Tensor, private: Tensor, depth: int, positions: Tensor | None,
    rotary: Tensor | None, *, scale: float,
) -> Tensor:  # fmt: skip
    out = torch.empty(q.shape, dtype=q.dtype)
    native.cpu().prefix_attention_fwd(
        q=address(q), k=address(k), v=address(v), q_stride=q.stride(0), k_stride=k.stride(0), v_stride=v.stride(0),
        pages=address(pages), page_stride=pages.stride(0), page_scales=address(page_scales),
        page_scales_stride=0 if page_scales is None else page_scales.stride(0), T=q.shape[0], N=lengths.shape[0],
        H=q.shape[1], D=q.shape[2], page_size=pages.shape[3], dtype=DTYPES[q.dtype], queries=address(queries),
        lengths=address(lengths), page_table=address(page_table), table_width=page_table.shape[1],
        order=address(order), shared=address(shared), runs=shared.shape[0], alone=address(private),
        positions=address(positions), rotary=address(rotary), rotary_dims=0 if rotary is None else rotary.shape[1],
        scale=scale, threads=threads(), out=address(out),
    )  # fmt: skip
    return out
