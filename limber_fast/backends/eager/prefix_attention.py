"""prefix_attention by scaled_dot_product_attention, sequence by sequence over its gathered pages."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from limber_fast.backends.eager.operands import wide


def prefix_attention_supports(request: Any) -> None:
    return None


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    """x [T, H, D]; angles [T, R]."""
    cos, sin = angles[:, None, 0::2], angles[:, None, 1::2]
    even, odd = wide(x[..., 0 : angles.shape[1] : 2]), wide(x[..., 1 : angles.shape[1] : 2])
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)
    return torch.cat([turned.to(x.dtype), x[..., angles.shape[1] :]], -1)


def _in_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows x [T, H, D] as integers, and their scales [T, H]; 0 where it would be no normal number, NaN where a row is
    not finite."""
    x = wide(x).float()
    scale = x.abs().amax(-1) / 127
    scale = scale.masked_fill(~scale.isfinite(), torch.nan).masked_fill(scale < torch.finfo(scale.dtype).tiny, 0)
    steps = (x / scale.masked_fill(scale == 0, 1)[..., None]).round()
    return steps.nan_to_num().to(torch.int8), scale


def prefix_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor, page_scales: Tensor | None, queries: Tensor, lengths: Tensor,
    page_table: Tensor, order: Tensor, shared: Tensor, private: Tensor, depth: int, positions: Tensor | None,
    rotary: Tensor | None, *, scale: float,
) -> Tensor:  # fmt: skip
    page_size = pages.shape[3]
    new = queries.diff()
    sequence = torch.repeat_interleave(torch.arange(len(new), device=q.device), new.long(), output_size=len(q))
    token = torch.arange(len(q), device=q.device) + (lengths - queries[1:]).long()[sequence]
    if rotary is not None:
        angles = rotary[token if positions is None else positions.long()]
        q, k = _rotated(q, angles), _rotated(k, angles)
    page, place = page_table[sequence, token // page_size].long(), token % page_size
    for side, x in enumerate((k, v)):
        if page_scales is not None:
            x, page_scales[page, :, side, place] = _in_int8(x)
        pages[page, :, side, place] = x
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for n, (first, last, length) in enumerate(zip(queries[:-1].tolist(), queries[1:].tolist(), lengths.tolist(),
                                                  strict=True)):  # fmt: skip
        if first == last:
            continue
        own = page_table[n, : -(-length // page_size)].long()
        held = pages[own]  # [pages, H, 2, page size, D]
        if page_scales is not None:
            held = held * page_scales[own][..., None].to(wide(q).dtype)
        keys, values = held.permute(2, 1, 0, 3, 4).flatten(2, 3)[:, :, :length]
        mask = torch.arange(length, device=q.device) <= token[first:last, None] if last - first > 1 else None
        rows = F.scaled_dot_product_attention(
            q[first:last].transpose(0, 1)[None].to(keys.dtype), keys[None], values[None], attn_mask=mask, scale=scale
        )
        out[first:last] = rows[0].transpose(0, 1)
    return out
