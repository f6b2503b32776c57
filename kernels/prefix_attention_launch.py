"""Launchers of the prefix_attention kernels."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from limber_fast.kernels import prefix_attention as kernels

# A single row of 2048 tokens keeps eight programs a head busy; more rows are programs enough, and their parts would
# only be memory: 4 D bytes a row, head and split.
SPLIT, FEW_ROWS = 256, 256
MOST_STRIDES = 64  # programs that share the rows of a tile of members


def tiles(rows: int, sequences: int, dtype: torch.dtype, dims: int) -> dict[str, int]:
    """Block sizes and warps of the two attention kernels: BLOCK_M is 64 where sequences bring as many rows."""
    full = dtype == torch.float32  # products without tensor cores: four warps would spill, and tiles of 64 rows
    many = rows >= 64 * sequences and not full
    return {"BLOCK_M": 64 if many else 16, "BLOCK_N": 32, "BLOCK_D": block_of(dims),
            "num_warps": 8 if many or full else 4, "num_stages": 2}  # fmt: skip


def block_of(dims: int) -> int:
    return max(16, triton.next_power_of_2(dims))


def prefix_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor, queries: Tensor, lengths: Tensor, page_table: Tensor, order: Tensor,
    shared: Tensor, private: Tensor, positions: Tensor | None, rotary: Tensor | None, out: Tensor, *, scale: float,
    precision: str,
) -> None:  # fmt: skip
    """Fills out [T, H, D], T > 0, and the new tokens' places in the pages; rows of q, k and v are contiguous."""
    (t, heads, dims), n, page_size = q.shape, len(lengths), pages.shape[3]
    width, runs, page_stride = page_table.shape[1], len(shared), pages.stride(0)
    split = SPLIT if t <= FEW_ROWS else 0
    splits = triton.cdiv(width * page_size, split) if split else 1
    slots = splits + runs
    turned = torch.empty_like(out)
    part_sums = out.new_empty(t, heads, slots, dims, dtype=torch.float32)
    part_tops, part_totals = out.new_zeros(2, t, heads, slots, dtype=torch.float32)
    kernels.prefix_attention_append_kernel[(t, heads)](
        q, k, v, pages, queries, lengths, page_table, queries if positions is None else positions,
        turned if rotary is None else rotary, turned, q.stride(0), k.stride(0), v.stride(0), page_stride, width, n,
        heads, dims, PAGE=page_size, ROTARY=0 if rotary is None else rotary.shape[1],
        HAS_POSITIONS=positions is not None, BLOCK_D=block_of(dims), num_warps=1,
    )  # fmt: skip
    blocks = tiles(t, n, q.dtype, dims)
    how = {**blocks, "SPLIT": split, "PAGE": page_size, "PRECISION": precision}
    parts = (part_sums, part_tops, part_totals)
    if runs:
        member_tiles, strides = triton.cdiv(n, blocks["BLOCK_M"]), min(MOST_STRIDES, triton.cdiv(t, n))
        kernels.prefix_attention_shared_kernel[(member_tiles * strides, heads, runs * splits)](
            turned, pages, queries, page_table, order, shared, *parts, page_stride, width, heads, dims, splits, slots,
            member_tiles, strides, scale, **how,
        )  # fmt: skip
    kernels.prefix_attention_alone_kernel[(triton.cdiv(t, blocks["BLOCK_M"]), heads, n * splits)](
        turned, pages, queries, lengths, page_table, private, *parts, page_stride, width, heads, dims, splits, slots,
        runs, scale, **how,
    )  # fmt: skip
    kernels.prefix_attention_merge_kernel[(t * heads,)](*parts, out, dims, slots, BLOCK_D=block_of(dims), num_warps=1)
