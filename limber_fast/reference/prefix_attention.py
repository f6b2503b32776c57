"""prefix_attention in plain PyTorch: sequence by sequence, query by query, page by page."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x [H, D] with its leading dimensions turned pair by pair; angles [R] holds cos, sin, cos, sin, ..."""
    turned = x.clone()
    even, odd, cos, sin = x[:, 0 : len(angles) : 2], x[:, 1 : len(angles) : 2], angles[0::2], angles[1::2]
    turned[:, 0 : len(angles) : 2] = even * cos - odd * sin
    turned[:, 1 : len(angles) : 2] = odd * cos + even * sin
    return turned


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor, queries: list[int], lengths: list[int],
    page_tables: list[list[int]], *, positions: list[int] | None = None, rotary: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The formula of `limber_fast.prefix_attention` in the dtype of `q`: out, and the pages as they are afterwards.

    Sharing is unknown here: each sequence reads its own page table.
    """
    pages, out, row = pages.clone(), torch.empty_like(q), 0
    scale = q.shape[2] ** -0.5 if scale is None else scale
    page_size = pages.shape[3]
    turned_q = []
    for new, length, table in zip(queries, lengths, page_tables, strict=True):
        for token in range(length - new, length):
            position = token if positions is None else positions[row]
            angles = torch.empty(0) if rotary is None else rotary[position].to(q.dtype)
            turned_q.append(rotate(q[row], angles))
            page, place = table[token // page_size], token % page_size
            pages[page, :, 0, place] = rotate(k[row], angles)
            pages[page, :, 1, place] = v[row]
            row += 1
    row = 0
    for new, length, table in zip(queries, lengths, page_tables, strict=True):
        held = [pages[table[j // page_size], :, :, j % page_size] for j in range(length)]
        held = torch.stack(held) if new else None
        for token in range(length - new, length):
            keys, values = held[: token + 1].unbind(2)  # [token + 1, H, D]
            logits = scale * (keys * turned_q[row]).sum(2)  # [token + 1, H]
            out[row] = (logits.softmax(0)[..., None] * values).sum(0)
            row += 1
    return out, pages
