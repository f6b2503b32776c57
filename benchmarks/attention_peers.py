"""prefix_attention by other packages: flash-attn and xformers over pages of 256 tokens, and torch.compile.

The whole pages of the prefix lie once and stand in every sequence's table, as servers share them; the rest of the
prefix is copied into each sequence's own pages. Nobody but the caches knows that the pages are shared: every sequence
reads all of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor

from limber_fast import rotary_table

PAGE = 256  # the smallest that flash-attn takes


class Pages:
    """Keys after rotary, and values: `storage` [copies, 2, pages, PAGE, H, D], `table` [B, pages of a sequence] int32.

    Args:
        prefix: [2, H, P, D].
        private: [2, H, S, D] by sequence.
        new: tokens that a call appends behind them.
        copies: as many caches of the same, to go round.
    """

    def __init__(self, prefix: Tensor, private: list[Tensor], new: int, copies: int) -> None:
        _, heads, shared_tokens, width = prefix.shape
        shared, b = shared_tokens // PAGE, len(private)
        tail = prefix[:, :, shared * PAGE :]
        self.cached, self.new = shared_tokens + private[0].shape[2], new
        own = -(-(self.cached + new) // PAGE) - shared
        self.storage = prefix.new_zeros(copies, 2, shared + b * own, PAGE, heads, width)
        tokens = self.storage.view(copies, 2, -1, heads, width)
        tokens[:, :, : shared * PAGE] = prefix[:, :, : shared * PAGE].transpose(1, 2)
        for n, piece in enumerate(private):
            rest = torch.cat([tail, piece], 2).transpose(1, 2)
            first = (shared + n * own) * PAGE
            tokens[:, :, first : first + rest.shape[1]] = rest
        ours = shared + torch.arange(b * own).view(b, own)
        self.table = torch.cat([torch.arange(shared).expand(b, -1), ours], 1).to(prefix.device, torch.int32)
        self._turn = count()

    def next(self) -> tuple[Tensor, Tensor]:
        """Keys and values [pages, PAGE, H, D] of the next cache."""
        keys, values = self.storage[next(self._turn) % len(self.storage)]
        return keys, values


def flash_attn(q: Tensor, k: Tensor, v: Tensor, pages: Pages, rotary: int) -> Callable[[], Tensor]:
    """q, k, v [B, T, H, D] -> [B, T, H, D]: rotary of the first `rotary` dimensions, append, attention in one call."""
    from flash_attn import flash_attn_with_kvcache

    # One angle for every place in the pages, in the dtype of q.
    angles = rotary_table(pages.table.shape[1] * PAGE, rotary).to(q.device, q.dtype).unflatten(1, (-1, 2))
    cos, sin = (part.contiguous() for part in angles.unbind(2))
    cached = torch.full((len(q),), pages.cached, dtype=torch.int32, device=q.device)

    def call() -> Tensor:
        keys, values = pages.next()
        return flash_attn_with_kvcache(
            q, keys, values, k, v, rotary_cos=cos, rotary_sin=sin, cache_seqlens=cached, block_table=pages.table,
            causal=True, rotary_interleaved=True,
        )  # fmt: skip

    return call


def xformers(
    q: Tensor, k: Tensor, v: Tensor, pages: Pages, turned: Callable[[Tensor], Tensor]
) -> Callable[[], Tensor]:
    """The same; `turned` rotates [B, T, H, D], as xformers' own rotary takes whole heads alone."""
    from xformers.ops import fmha

    b, new = q.shape[:2]
    places = torch.arange(pages.cached, pages.cached + new, device=q.device)
    at = (pages.table[:, places // PAGE] * PAGE + places % PAGE).flatten()
    bias = fmha.attn_bias.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
        q_seqlen=[new] * b, kv_seqlen=[pages.cached + new] * b, block_tables=pages.table, page_size=PAGE,
        device=q.device,
    )  # fmt: skip
    # Left to itself xformers takes pages by flash-attn alone. This one, of up to 16 queries, needs nothing but Triton.
    split_keys = fmha.triton_splitk.FwOp

    def call() -> Tensor:
        keys, values = (x.flatten(0, 1) for x in pages.next())
        keys.index_copy_(0, at, turned(k).flatten(0, 1))
        values.index_copy_(0, at, v.flatten(0, 1))
        out = fmha.memory_efficient_attention_forward(
            turned(q).flatten(0, 1)[None], keys[None], values[None], attn_bias=bias, op=split_keys
        )
        return out.view(q.shape)

    return call


def eager_in_parts(q: Tensor, k: Tensor, v: Tensor, table: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None):
    """What eager does, without complex numbers, of which torch.compile makes no code.

    q, k, v [B, T, H, D]; table [T, rotary] cos and sin by turns; keys, values [B, H, S, D], T of S new; mask [T, S].
    """
    new, length = q.shape[1], keys.shape[2]
    cos, sin = table.unflatten(1, (-1, 2))[:, None].unbind(-1)

    def turned(x: Tensor) -> Tensor:
        even, odd = x[..., : table.shape[1]].float().unflatten(-1, (-1, 2)).unbind(-1)
        pairs = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
        return torch.cat([pairs.to(x.dtype), x[..., table.shape[1] :]], -1)

    keys[:, :, length - new :] = turned(k).transpose(1, 2)
    values[:, :, length - new :] = v.transpose(1, 2)
    causal = mask is None and new > 1
    out = F.scaled_dot_product_attention(turned(q).transpose(1, 2), keys, values, attn_mask=mask, is_causal=causal)
    return out.transpose(1, 2)
