"""prefix_attention: attention of new tokens over paged keys and values, prefixes shared, rotary and append fused."""

from __future__ import annotations

import torch
from torch import Tensor

from limber_fast import checks, dispatch
from limber_fast.ops import registration
from limber_fast.ops.paged_batch import PAGE_SIZE, PagedBatch
from limber_fast.ops.prefix_attention_op import PrefixAttentionRequest

__all__ = ["PAGE_SIZE", "PagedBatch", "PrefixAttentionRequest", "prefix_attention", "rotary_table"]

_OP = "prefix_attention"


def typical_request(device: torch.device) -> PrefixAttentionRequest:
    """The call that `limber-fast env` asks the backends about."""
    return PrefixAttentionRequest(device, torch.bfloat16, torch.bfloat16, 16, 256, PAGE_SIZE)


def rotary_table(positions: int, dims: int = 64, base: float = 10000.0, device: torch.device | str = "cpu") -> Tensor:
    """[positions, dims] fp32 for `prefix_attention`: cos and sin of position * base^(-2 i / dims), pair by pair.

    Angles are rounded to fp32 as in transformers' GPT-J, whose weights they meet: at position 2048 that is 1e-4.
    """
    frequencies = 1.0 / (base ** (torch.arange(0, dims, 2, dtype=torch.int64) / dims))
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()], -1).flatten(1).to(device)


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pages: Tensor,
    batch: PagedBatch,
    *,
    page_scales: Tensor | None = None,
    rotary: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal attention of the newest tokens of several sequences over all their tokens, which lie in pages.

    The rows of q, k and v are the new tokens of all sequences, one sequence after the other. k is rotated, k and v are
    written to their places in `pages`, and row t, token i of its sequence (0-based, cached tokens included), gets::

        out[t] = sum_{j <= i} softmax_j(scale <rot_i q[t], K[j]>) V[j]    with K, V the sequence's rows of pages

    One call serves prefill (a sequence brings all its tokens), chunked prefill, decode (one token each) and any mixture
    of them. Tokens that several sequences hold in the same pages (forks of one prefix) are read once for all of them
    and multiplied as a matrix of all their queries; parts merge by their log-sum-exp. Which tokens those are follows
    from the page tables alone, see `PagedBatch`; where sharing does not pay, and for a sequence alone, it is plain
    attention.

    Layout: a page holds `PAGE_SIZE` tokens of one layer as [H, 2, page size, D], K then V. So a head's K and V of a
    page are one contiguous run (8 KiB in bf16 at D = 256): a bulk copy of a GPU, two pages of a CPU's prefetcher, and
    K rows are rows of a matrix operand as they lie (AMX tiles, ldmatrix) without a transposition when a token is
    appended. 8 tokens, because a fork in the middle of a page copies it with the first write and the last page is half
    empty on average: 7 tokens of 160 (the private part of a question about one image) are 4%, with 16 they are 9%; and
    the mma and AMX tiles take 16 or 32 keys of several pages as easily as of one. Int8 pages of a `PagePool`, whose
    rows are half as long, hold 16.

    Args:
        q: [T, H, D] fp16|bf16|fp32 (fp64 on the eager backend), the T new tokens of `batch`; contiguous in its last
            two dimensions, as a view of a fused product is. Not rotated yet. Frozen, as are k and v: train with
            torch.nn.functional.scaled_dot_product_attention.
        k, v: like q.
        pages: [n_pages, H, 2, page size, D] in the dtype of q, or int8: all pages of the layer. Written in place.
            Unused places may hold anything, NaN included.
        batch: where the sequences' tokens lie: made once per step and used for every layer.
        page_scales: [n_pages, H, 2, page size] fp32, of int8 pages: a key or value is its integers times its scale,
            largest magnitude / 127, rounded to nearest when it is written and never again; one that is not finite gets
            the scale NaN. Written in place, as pages are. None for other pages.
        rotary: [positions, R] fp32 by `rotary_table`: dimensions 0..R-1 of q and k are rotated in interleaved pairs
            (2 i, 2 i + 1), in fp32, and rounded to the dtype of q; None: not rotated.
        scale: of the logits, above 0; None: D^(-1/2).
        backend: 'auto', 'cpu', 'cuda', 'triton' or 'eager'; see `limber_fast.use_backend`.

    Returns:
        [T, H, D] in the dtype of q, contiguous. Softmax in fp32; products in the dtype of q, of int8 pages too. A
        sequence's result depends on the other sequences only within the rounding of a merge. NaN and Inf reach those
        tokens that see them, and perhaps earlier ones of the same sequence and head, whose weight of 0 is multiplied
        with them.

    Raises:
        ValueError: a shape or value breaks the contract above; an input that requires grad. TypeError: a dtype or kind
            does.
        BackendUnavailable: the named backend cannot run this call.

    Source: Juravsky et al., Hydragen, arXiv 2402.05099, section 3; Kwon et al., PagedAttention, arXiv 2309.06180; Su et
    al., RoFormer, arXiv 2104.09864, section 3.4.2.
    """
    checks.choice(_OP, "backend", backend, dispatch.CHOICES)
    checks.paged_batch(_OP, batch, PagedBatch)
    checks.attention_operands(_OP, q, k, v, batch)
    checks.key_value_pages(_OP, pages, page_scales, q, batch)
    if rotary is not None:
        checks.rotary_angles(_OP, rotary, q, batch)
    if scale is None:
        scale = q.shape[2] ** -0.5
    checks.positive(_OP, "scale", scale)
    return registration.call(
        torch.ops.limber_fast.prefix_attention_fwd.default,
        _rows(q), _rows(k), _rows(v), pages, page_scales, batch.queries, batch.lengths, batch.page_table, batch.order,
        batch.shared, batch.private, batch.depth, batch.positions, rotary, float(scale), dispatch.preferred(backend),
    )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
