"""GPT-J's attention: interleaved rotary positions, a contiguous KV cache, and causal attention of ragged rows."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from limber_fast.models.gptj_config import GPTJConfig


@lru_cache(maxsize=8)
def _rotations(positions: int, rotary_dim: int, device: torch.device) -> Tensor:
    """[positions, rotary_dim / 2] complex64: exp(i p / 10000^(2 j / rotary_dim)), angles in fp32 as in training."""
    frequency = 1.0 / (10000 ** (torch.arange(0, rotary_dim, 2, dtype=torch.int64) / rotary_dim))
    angle = torch.arange(positions, dtype=torch.float32)[:, None] * frequency
    return torch.polar(torch.ones_like(angle), angle).to(device)


def rotations(config: GPTJConfig, positions: Tensor) -> Tensor:
    """[T, rotary_dim / 2] complex: what each pair of each token's queries and keys is multiplied by."""
    with torch.inference_mode(False):  # cached: it must not be an inference tensor when training meets it later
        table = _rotations(config.n_positions, config.rotary_dim, positions.device)
    return table[positions]


def _rotate_(x: Tensor, rotation: Tensor) -> Tensor:
    """x [T, 3, H, D] in place: of q and k, neighbours within the first rotary_dim dimensions are complex numbers."""
    part = x[:, :2, :, : 2 * rotation.shape[-1]]
    wide = part.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))
    turned = torch.view_as_complex(wide.contiguous()) * rotation[:, None, None, :]
    part.copy_(torch.view_as_real(turned).flatten(-2))
    return x


def rotate(qkv: Tensor, rotation: Tensor) -> Tensor:
    """Rotary positions of q and k in qkv [T, 3, H, D], which is overwritten; rotation [T, rotary_dim / 2] complex."""
    if torch.is_grad_enabled() and qkv.requires_grad:
        return _Rotate.apply(qkv, rotation)
    return _rotate_(qkv, rotation)


class _Rotate(torch.autograd.Function):
    """In place both ways: q, k and v stay the one buffer that their product wrote, and nothing else is saved."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, rotation: Tensor) -> Tensor:
        ctx.save_for_backward(rotation)
        ctx.mark_dirty(qkv)
        return _rotate_(qkv, rotation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rotation,) = ctx.saved_tensors
        return _rotate_(grad.clone(), rotation.conj()), None


class KVCache:
    """Keys (after rotary) and values of B sequences, contiguous per layer, growing by doubling.

    Attributes:
        lengths: tokens held, per sequence. positions: the position of each sequence's next token.
    """

    def __init__(self, config: GPTJConfig, batch: int, dtype: torch.dtype, device: torch.device, capacity: int = 64):
        shape = (2, batch, config.n_head, capacity, config.head_dim)
        # Zeros: a masked place has weight 0 in the attention of a shorter row, and 0 times NaN would be NaN.
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layer)]
        self.lengths, self.positions, self.limit = [0] * batch, [0] * batch, config.n_positions

    def reserve(self, capacity: int) -> None:
        """Room for `capacity` tokens in every sequence."""
        held = self.layers[0].shape[3]
        if capacity <= held:
            return
        capacity = min(max(capacity, 2 * held), max(capacity, self.limit))
        for index, layer in enumerate(self.layers):
            grown = layer.new_zeros((*layer.shape[:3], capacity, layer.shape[4]))
            grown[..., :held, :] = layer
            self.layers[index] = grown

    def select(self, rows: list[int]) -> None:
        """Keeps these sequences alone, in this order."""
        index = torch.tensor(rows, device=self.layers[0].device)
        self.layers = [layer[:, index] for layer in self.layers]
        self.lengths, self.positions = ([x[row] for row in rows] for x in (self.lengths, self.positions))


def attention(
    qkv: Tensor, rotation: Tensor, lengths: list[int], config: GPTJConfig, cache: KVCache | None, layer: int
) -> Tensor:
    """Causal attention of B sequences of new tokens, packed one after another, over themselves and what is cached.

    Args:
        qkv: [T, 3 E], T = sum(lengths), overwritten. rotation: [T, rotary_dim / 2], of `rotations`.
        lengths: new tokens of each sequence.
        cache: what came before; the new keys and values are written behind it. The caller has reserved the room, and
            counts them in `cache.lengths` after the last layer.

    Returns: [T, E].
    """
    heads = (config.n_head, config.head_dim)
    x = rotate(qkv.view(-1, 3, *heads), rotation)
    batch, longest = len(lengths), max(lengths)
    if cache is None or not any(cache.lengths):
        if cache is not None:
            for row, part in enumerate(x.split(lengths)):
                cache.layers[layer][:, row, :, : lengths[row]] = part[:, 1:].permute(1, 2, 0, 3)
        if min(lengths) == longest:
            return _causal(x.view(batch, longest, 3, *heads))
        return torch.cat([_causal(part[None]) for part in x.split(lengths)])

    starts, store = cache.lengths, cache.layers[layer]
    if longest == 1:  # decode
        rows, at = torch.arange(batch, device=x.device), torch.tensor(starts, device=x.device)
        store[:, rows, :, at] = x[:, 1:]  # [B, 2, H, D]: indices that stand apart put their dimension first
        most = max(starts) + 1
        mask = None if min(starts) + 1 == most else (torch.arange(most, device=x.device) <= at[:, None])[:, None, None]
        out = F.scaled_dot_product_attention(x[:, 0, :, None], *store[..., :most, :], attn_mask=mask)
        return out.reshape(batch, -1)
    outputs = []
    for row, part in enumerate(x.split(lengths)):
        start, end = starts[row], starts[row] + lengths[row]
        store[:, row, :, start:end] = part[:, 1:].permute(1, 2, 0, 3)
        mask = torch.ones(lengths[row], end, dtype=torch.bool, device=x.device).tril(start)
        out = F.scaled_dot_product_attention(part[:, 0].transpose(0, 1), *store[:, row, :, :end], attn_mask=mask)
        outputs.append(out.transpose(0, 1).reshape(lengths[row], -1))
    return torch.cat(outputs)


def _causal(x: Tensor) -> Tensor:
    """[B, S, 3, H, D] -> [B S, E], each sequence over itself."""
    out = F.scaled_dot_product_attention(*x.permute(2, 0, 3, 1, 4), is_causal=True)
    return out.transpose(1, 2).reshape(x.shape[0] * x.shape[1], -1)
