"""GPT-J's attention of whole sequences over themselves, no cache kept: what training differentiates through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from limber_fast import dispatch
from limber_fast.models.gptj_attention import rotate
from limber_fast.models.gptj_config import GPTJConfig
from limber_fast.ops.prefix_attention import PagedBatch, PrefixAttentionRequest, prefix_attention

_SCORE_BYTES = 16 << 20  # of scores at a time in the backward pass


def differentiable_attention(
    config: GPTJConfig, lengths: Sequence[int], rotation: Tensor
) -> Callable[[Tensor, int], Tensor]:
    """(q|k|v [T, 3 E], layer) -> [T, E]: causal, each of the packed sequences over itself; q|k|v is overwritten.

    Sequences of like lengths are attended together, padded behind, which no token before sees: one by one, 64 captions
    of a dozen tokens took half of a training step.
    """
    uniform = min(lengths) == max(lengths)
    groups = [] if uniform else _alike(lengths)
    padded = [len(rows) * lengths[rows[0]] for rows in groups]
    if not uniform:
        taken, back = (index.to(rotation.device) for index in _padding(lengths, groups))

    def attend(qkv: Tensor, layer: int) -> Tensor:
        x = rotate(qkv.view(-1, 3, config.n_head, config.head_dim), rotation)
        if uniform:
            return _causal(x.unflatten(0, (len(lengths), -1)))
        parts = x.index_select(0, taken).split(padded)
        attended = [_causal(x.unflatten(0, (len(rows), -1))) for rows, x in zip(groups, parts, strict=True)]
        return torch.cat(attended).index_select(0, back)

    return attend


def _alike(lengths: Sequence[int]) -> list[list[int]]:
    """Sequences by falling length, a new group where one is padded by more than a third, below 32 tokens by more than
    its length."""
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        longest = lengths[groups[-1][0]] if groups else 0
        if 4 * lengths[row] >= 3 * longest > 0 or (longest <= 32 and 2 * lengths[row] >= longest > 0):
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _padding(lengths: Sequence[int], groups: list[list[int]]) -> tuple[Tensor, Tensor]:
    """(the packed token for every padded place, the padded place of every packed token); padding repeats a last token,
    whose gradient it adds nothing to."""
    starts = [end - length for end, length in zip(accumulate(lengths), lengths, strict=True)]
    taken: list[int] = []
    back = torch.empty(sum(lengths), dtype=torch.int64)
    for rows in groups:
        longest = lengths[rows[0]]
        for row in rows:
            start, length = starts[row], lengths[row]
            back[start : start + length] = torch.arange(len(taken), len(taken) + length)
            taken += [*range(start, start + length), *[start + length - 1] * (longest - length)]
    return torch.tensor(taken), back


def _causal(x: Tensor) -> Tensor:
    """[B, S, 3, H, D] -> [B S, E], each sequence over itself."""
    small = x.dtype.itemsize == 2 and 4 * x.shape[3] * x.shape[1] ** 2 <= _SCORE_BYTES
    recorded = torch.is_grad_enabled() and x.requires_grad
    attend = _attention if not recorded else _CpuCausal.apply if small and x.device.type == "cpu" else _sdpa
    return attend(x).reshape(x.shape[0] * x.shape[1], -1)


def _sdpa(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*x.permute(2, 0, 3, 1, 4), is_causal=True).transpose(1, 2)


def _attention(x: Tensor) -> Tensor:
    """[B, S, 3, H, D] -> [B, S, H, D], not differentiable. In 16 bits on the CPU by `prefix_attention`, a page for each
    sequence: 256 tokens at GPT-J's width take 2.2 ms, torch's kernel 6.7 (Zen 4, 2 threads)."""
    b, s, _, h, d = x.shape
    if x.device.type != "cpu" or x.dtype.itemsize != 2 or torch.compiler.is_compiling():
        return _sdpa(x)
    if dispatch.preferred("auto") not in ("auto", "cpu"):
        return _sdpa(x)
    request = PrefixAttentionRequest(x.device, x.dtype, x.dtype, h, d, s)
    if dispatch.select("prefix_attention", request).__name__ != "limber_fast.backends.cpu":
        return _sdpa(x)
    q, k, v = x.detach().flatten(0, 1).unbind(1)
    return prefix_attention(q, k, v, x.new_empty(b, h, 2, s, d), _one_page_each(b, s)).view(b, s, h, d)


@lru_cache(maxsize=64)
def _one_page_each(sequences: int, tokens: int) -> PagedBatch:
    with torch.inference_mode(False):
        pages = [[page] for page in range(sequences)]
        return PagedBatch([tokens] * sequences, [tokens] * sequences, pages, page_size=tokens)


class _CpuCausal(torch.autograd.Function):
    """A backward of batched products, for 16 bits and short sequences, where torch's own is slow:
    18 ms to 3.4 for 64 captions of 13 tokens, 90 to 65 for 4 sequences of 176 at GPT-J's width (bf16, 2 threads, a Xeon
    without AMX). In fp32, or from about 1,000 tokens on, torch's is the faster one. Nothing but x is saved.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _attention(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _CpuCausalBackward.apply(*ctx.saved_tensors, grad)


class _CpuCausalBackward(torch.autograd.Function):
    """With P = softmax(Q K^T / sqrt(D)), dP = dO V^T and dS = P (dP - sum_j P dP) / sqrt(D):

        dQ = dS K;  dK = dS^T Q;  dV = P^T dO

    Scores and dP are products in fp32: rounded to 16 bits they cost digits by the size of the scores (15 times torch's
    error at scores of 36). Of as many sequences at a time as fit into `_SCORE_BYTES`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, grad: Tensor) -> Tensor:
        b, s, _, h, d = x.shape
        out = torch.empty_like(x)
        future = torch.ones(s, s, dtype=torch.bool).triu_(1)
        # Other products in 16 bits take ten times as long as in 32.
        fast = x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        dtype = x.dtype if fast else torch.float32
        part = _SCORE_BYTES // (4 * h * s * s)
        for start in range(0, b, part):
            rows = slice(start, start + part)
            q, k, v = x[rows].permute(2, 0, 3, 1, 4).to(dtype).contiguous()
            given = grad[rows].transpose(1, 2).to(dtype)
            p = (q.float() @ k.float().mT).mul_(d**-0.5).masked_fill_(future, -torch.inf).softmax(-1)
            ds = (given.float() @ v.float().mT).mul_(p)
            ds = ds.sub_(p * ds.sum(-1, keepdim=True)).mul_(d**-0.5).to(dtype)
            for at, found in enumerate((ds @ k, ds.mT @ q, p.to(dtype).mT @ given)):
                out[rows, :, at] = found.transpose(1, 2)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError("GPTJ: attention's gradient cannot be differentiated again; use create_graph=False")
