"""project_concat with the soft prompts as a tensor of their own, put into the embedded sequence."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from limber_fast.backends.eager.operands import wide
from limber_fast.ops.project_concat import dropout_threshold

_LOW, _STEP = 2**32 - 1, 0x9E3779B97F4A7C15 - 2**64


def project_concat_supports(request: Any) -> None:
    return None


def _shifted(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & (2 ** (64 - bits) - 1)  # torch has no unsigned shift of 64 bits


def _mix64(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    z = (z ^ _shifted(z, 27)) * (0x94D049BB133111EB - 2**64)
    return z ^ _shifted(z, 31)


def _mask(seed: int, dropout_p: float, rows: int, columns: int, like: Tensor) -> Tensor:
    """0 where dropped, else 1 / (1 - p): limber_fast.reference.project_concat.random_words in wrapping int64."""
    index = torch.arange(1, rows + 1, device=like.device, dtype=torch.int64)
    start = _mix64(torch.full((), seed, device=like.device, dtype=torch.int64) + _STEP)
    key = _mix64(start + index * _STEP)[:, None]
    x = (torch.arange(columns, device=like.device, dtype=torch.int64) + (key & _LOW)) & _LOW
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _LOW
    x = ((x ^ (x >> 15)) + _shifted(key, 32)) & _LOW
    x = (x * 0x846CA68B) & _LOW
    return ((x ^ (x >> 16)) >= dropout_threshold(dropout_p)) * torch.full_like(like, 1 / (1 - dropout_p))


def _projected(
    features: Tensor, weight: Tensor, bias: Tensor | None, seed: int, dropout_p: float
) -> tuple[Tensor, Tensor | None]:
    """[rows, E] soft prompts after dropout, wide, and the mask."""
    prompts = wide(F.linear(features.reshape(-1, features.shape[2]), weight, bias))
    if not dropout_p:
        return prompts, None
    mask = _mask(seed, dropout_p, *prompts.shape, prompts.new_empty(()))
    return prompts * mask, mask


def project_concat_fwd(
    features: Tensor, weight: Tensor, bias: Tensor | None, ln_weight: Tensor | None, ln_bias: Tensor | None,
    input_ids: Tensor, embedding: Tensor, embedding_scales: Tensor | None, positions: Tensor, *, image_token_id: int,
    seed: int, dropout_p: float, ln_eps: float | None,
) -> Tensor:  # fmt: skip
    prompts, _ = _projected(features, weight, bias, seed, dropout_p)
    if ln_eps is not None:
        prompts = F.layer_norm(prompts, prompts.shape[1:], ln_weight, ln_bias, ln_eps)
    tokens = input_ids.masked_fill(input_ids == image_token_id, 0)
    rows = embedding[tokens]
    if embedding_scales is not None:
        rows = rows.float() * embedding_scales[tokens][..., None]
    inputs_embeds = rows.to(features.dtype)
    inputs_embeds.view(-1, weight.shape[0])[positions] = prompts.to(features.dtype)
    return inputs_embeds


def project_concat_bwd(
    grad: Tensor, features: Tensor, weight: Tensor, bias: Tensor | None, ln_weight: Tensor | None, positions: Tensor, *,
    seed: int, dropout_p: float, ln_eps: float | None, needs: list[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    need_features, need_weight, need_bias, need_ln_weight, need_ln_bias = needs
    d_features = d_weight = d_bias = d_ln_weight = d_ln_bias = mask = None
    g = wide(grad.reshape(-1, grad.shape[2])[positions])
    if ln_eps is not None:
        prompts, mask = _projected(features, weight, bias, seed, dropout_p)
        centred = prompts - prompts.mean(1, keepdim=True)
        rstd = (centred.square().mean(1, keepdim=True) + ln_eps).rsqrt()
        unit = centred * rstd
        d_ln_weight, d_ln_bias = (g * unit).sum(0) if need_ln_weight else None, g.sum(0) if need_ln_bias else None
        g = g if ln_weight is None else g * ln_weight
        g = rstd * (g - g.mean(1, keepdim=True) - unit * (g * unit).mean(1, keepdim=True))
    elif dropout_p:
        mask = _mask(seed, dropout_p, *g.shape, g.new_empty(()))
    if mask is not None:
        g = g * mask
    if need_bias:
        d_bias = g.sum(0).to(features.dtype)
    g = g.to(features.dtype)
    if need_weight:
        d_weight = g.T @ features.reshape(-1, features.shape[2])
    if need_features:
        d_features = (g @ weight).reshape(features.shape)
    return d_features, d_weight, d_bias, d_ln_weight, d_ln_bias
