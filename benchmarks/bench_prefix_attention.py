"""prefix_attention at GPT-J's width (16 heads of 256 dimensions): decode, alone and over a shared prefix, and prefill.

Eager is what a careful engineer writes: rotary in complex numbers, new keys and values into a contiguous cache
[B, H, S, D], scaled_dot_product_attention over it. Decode reads memory: calls go round several layers, and no cache
holds the next one. Rows of group int8 keep keys and values in int8; '16_bits' is this op over the same in bf16.
On CUDA peers are torch.compile of eager, flash-attn and xformers: `attention_peers.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import attention_peers
import cases
import pytest
import torch
import torch.nn.functional as F
from comparison import Trial, Workload, add_peer, compiled
from torch import Tensor

from limber_fast import prefix_attention, rotary_table
from limber_fast.cache import PagePool, page_size_of

H, D, ROTARY = 16, 256, 64
COLD_BYTES = 560 << 20
# Of one rounding of the result and, in bf16, of the weights; eager rounds as often.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def _turned(x: Tensor, angles: Tensor) -> Tensor:
    """x [B, S, H, D] with its first dimensions rotated; angles [S, ROTARY / 2] complex."""
    pairs = torch.view_as_complex(x[..., :ROTARY].float().unflatten(-1, (-1, 2)))
    turned = torch.view_as_real(pairs * angles[:, None]).flatten(-2)
    return torch.cat([turned.to(x.dtype), x[..., ROTARY:]], -1)


def prepare(workload: Workload) -> Trial:
    b, prefix, cached, new = (workload.shape[letter] for letter in ("B", "P", "S", "T"))
    dtype, device = getattr(torch, workload.dtype), workload.device
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, b, new, H, D, generator=generator).to(device, dtype)
    length, private = prefix + cached + new, cached + new
    token_bytes = 2 * H * D * dtype.itemsize
    full_bytes = b * length * token_bytes
    decode = new == 1

    def layers(bytes_of_one: int) -> int:
        return max(1, -(-COLD_BYTES // bytes_of_one)) if decode else 1

    table = rotary_table(length, ROTARY, device=device)
    angles = torch.view_as_complex(table.unflatten(1, (-1, 2)))[length - new :]
    held = torch.randn(2, H, prefix + b * cached, D, generator=generator).to(device, dtype)  # K after rotary, and V
    pieces = held.split([prefix, *[cached] * b], 2)

    rows = [x.flatten(0, 1) for x in (q, k, v)]

    # Eager and our own path without sharing: every sequence its own copy.
    caches = torch.empty(layers(full_bytes), 2, b, H, length, D, dtype=dtype, device=device)
    caches[..., :prefix, :] = pieces[0][:, None]
    caches[..., prefix : length - new, :] = torch.stack(pieces[1:], 1)
    mask = None
    if 1 < new < length:
        places = torch.arange(length, device=device)
        mask = places <= places[length - new :, None]

    def paged(kind: torch.dtype) -> tuple[Callable[[], Tensor], int]:
        """Attention over one pool, filled through its own pages, and the bytes that a call reads of it."""
        number = PagePool.bytes_of_page(1, H, D, kind, 1)
        copies, size = layers((prefix + b * private) * number), page_size_of(kind)
        pool = PagePool(copies, H, D, dtype=kind, device=device,
                        budget_bytes=copies * (prefix + b * (private + 2 * size) + 2 * size) * number)  # fmt: skip

        def fill(sequence, tokens: int, piece: Tensor) -> None:
            row = pool.batch([sequence], [tokens]).page_table[0]
            if kind == torch.int8:
                scales = piece.float().abs().amax(-1) / 127
                piece = (piece.float() / scales[..., None]).round().to(kind)
            for j in range(tokens):
                at = sequence.length - tokens + j
                pool.storage[:, row[at // size], :, :, at % size] = piece[:, :, j].transpose(0, 1)
                if kind == torch.int8:
                    pool.scales[:, row[at // size], :, :, at % size] = scales[:, :, j].T

        trunk = pool.sequence()
        fill(trunk, prefix, pieces[0])
        members = [trunk.fork() for _ in range(b)]
        for member, piece in zip(members, pieces[1:], strict=True):
            fill(member, cached, piece)
        batch, turn = pool.batch(members, [new] * b), count()

        def attend() -> Tensor:
            layer = next(turn) % copies
            pages, scales = pool.layer(layer), pool.layer_scales(layer)
            return prefix_attention(*rows, pages, batch, page_scales=scales, rotary=table).view(b, new, H, D)

        return attend, (prefix + b * private) * number

    in_int8, eager_turn = workload.group == "int8", count()
    ours, ours_bytes = paged(torch.int8 if in_int8 else dtype)

    def eager() -> Tensor:
        keys, values = caches[next(eager_turn) % len(caches)]
        keys[:, :, length - new :] = _turned(k, angles).transpose(1, 2)
        values[:, :, length - new :] = v.transpose(1, 2)
        out = F.scaled_dot_product_attention(
            _turned(q, angles).transpose(1, 2), keys, values, attn_mask=mask, is_causal=mask is None and new > 1
        )
        return out.transpose(1, 2)

    baselines = {"eager": eager}
    if in_int8:
        baselines["16_bits"], _ = paged(dtype)
    elif prefix and decode:
        apart = PagePool(layers(full_bytes), H, D, dtype=dtype, device=device,
                         budget_bytes=layers(full_bytes) * b * (length + 8) * token_bytes)  # fmt: skip
        separate = [apart.sequence() for _ in range(b)]
        alone = apart.batch(separate, [length] * b)
        for n in range(b):
            pages = alone.page_table[n].long()
            whole = F.pad(caches[0, :, n], (0, 0, 0, -length % 8)).unflatten(2, (-1, 8))  # [2, H, pages, 8, D]
            apart.storage[:, pages] = whole.permute(2, 1, 0, 3, 4)
        for sequence in separate:
            sequence.truncate(length - new)
        alone = apart.batch(separate, [new] * b)
        alone_turn = count()

        def unshared() -> Tensor:
            layer = apart.layer(next(alone_turn) % len(apart.storage))
            return prefix_attention(*rows, layer, alone, rotary=table).view(b, new, H, D)

        baselines["unshared"] = unshared

    skipped: dict[str, str] = {}
    if workload.group == "cuda":
        in_parts, compiled_turn = compiled(attention_peers.eager_in_parts), count()
        baselines["compile"] = lambda: in_parts(
            q, k, v, table[length - new :], *caches[next(compiled_turn) % len(caches)], mask
        )
        copies = layers((prefix + b * private) * token_bytes)

        def cache() -> attention_peers.Pages:
            return attention_peers.Pages(pieces[0], list(pieces[1:]), new, copies)

        add_peer("flash_attn", lambda: attention_peers.flash_attn(q, k, v, cache(), ROTARY), baselines, skipped)
        add_peer(
            "xformers", lambda: attention_peers.xformers(q, k, v, cache(), lambda x: _turned(x, angles)),
            baselines, skipped,
        )  # fmt: skip

    some = sorted({0, new // 2, new - 1})
    wide_q, wide_k = (_turned(x.double(), angles.to(torch.complex128)) for x in (q, k))

    def errors(out: Tensor) -> dict[str, float]:
        worst = 0.0
        for n in sorted({0, b - 1}):
            past = torch.cat([pieces[0], pieces[1 + n]], 2).double()
            keys = torch.cat([past[0], wide_k[n].to(dtype).double().transpose(0, 1)], 1)
            values = torch.cat([past[1], v[n].double().transpose(0, 1)], 1)
            for t in some:
                seen = length - new + t + 1
                logits = torch.einsum("hd,hjd->hj", wide_q[n, t], keys[:, :seen]) / D**0.5
                true = torch.einsum("hj,hjd->hd", logits.softmax(1), values[:, :seen])
                worst = max(worst, *cases.errors(out[n, t], true))
        return {"out": worst}

    visible = b * sum(length - new + t + 1 for t in range(new))
    return Trial(
        ours=ours, baselines=baselines, errors=errors, tolerance=3e-2 if in_int8 else TOLERANCE[workload.dtype],
        baseline_tolerance=2 * TOLERANCE[workload.dtype], flops=4.0 * H * D * visible,
        bytes=ours_bytes + 4 * b * new * H * D * dtype.itemsize, bound="bytes" if decode else "flops", skipped=skipped,
    )  # fmt: skip


def workload(group: str, b: int, prefix: int, cached: int, new: int, dtype: str = "bfloat16", *, quick=False, **fields):
    row = Workload("prefix_attention", group, {"B": b, "P": prefix, "S": cached, "T": new}, dtype,
                   cost=4.0 * H * D * b * (new + 8) * (prefix + cached + new), prepare=prepare, **fields)  # fmt: skip
    return pytest.param(row, id=f"{group}-{row.name}", marks=[pytest.mark.quick] if quick else [])


WORKLOADS = [
    *(workload("decode", b, 0, s, 1, quick=b == 8 and s == 512) for b in (1, 8, 32) for s in (16, 128, 512, 2000)
      if b * s < 20000),
    *(workload("shared", b, p, s, 1, quick=b == 32 and s == 64) for b, p, s in (
        (2, 64, 16), (2, 800, 64), (4, 128, 16), (8, 800, 64), (32, 16, 64), (32, 128, 64), (32, 800, 64),
        (32, 800, 160), (64, 1600, 32))),
    *(workload("prefill", b, 0, 0, t) for b, t in ((1, 16), (1, 64), (1, 256), (1, 1024), (1, 2040), (8, 160))),
    *(workload("chunk", b, p, 0, t) for b, p, t in ((1, 624, 161), (8, 624, 161), (1, 1024, 256), (16, 624, 8))),
    *(workload("fp32", *shape, "float32") for shape in ((8, 0, 512, 1), (32, 800, 64, 1), (1, 0, 0, 512))),
    *(workload("int8", *shape) for shape in ((1, 0, 2000, 1), (8, 0, 512, 1), (32, 800, 64, 1), (1, 0, 0, 512))),
    *(workload("isa", *shape, isa=isa) for shape in ((32, 800, 64, 1), (1, 0, 0, 512)) for isa in ("avx512", "avx2")),
    *(workload("cuda", *shape, device="cuda") for shape in ((32, 800, 64, 1), (8, 0, 2000, 1))),
]  # fmt: skip


@pytest.mark.parametrize("workload", WORKLOADS)
def test_prefix_attention(compare, workload):
    compare(workload)
