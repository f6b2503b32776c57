"""Launchers of the prefix_attention kernels."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from limber_fast.kernels import prefix_attention as kernels

# A single row of 2048 tokens keeps eight programs a head busy; more rows are programs enough, and their parts would
# only be memory: 4 D bytes a row and head, for every split and every run that a sequence shares.
SPLIT, FEW_ROWS = 256, 256


def tiles(rows: int, dtype: torch.dtype, dims: int) -> dict[str, int]:
    """Block sizes and warps of an attention kernel whose tiles can be as high as `rows`."""
    # Products without tensor cores spill from four warps and tiles of 64 rows; with two stages some small tiles too.
    full = dtype == torch.float32
    many = rows >= 64 and not full
    return {"BLOCK_M": 64 if many else 16, "BLOCK_N": 32, "BLOCK_D": block_of(dims),
            "num_warps": 8 if many or full else 4, "num_stages": 2 if many else 3}  # fmt: skip


def block_of(dims: int) -> int:
    return max(16, triton.next_power_of_2(dims))


def prefix_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor, page_scales: Tensor | None, queries: Tensor, lengths: Tensor,
    page_table: Tensor, order: Tensor, shared: Tensor, private: Tensor, depth: int, positions: Tensor | None,
    rotary: Tensor | None, out: Tensor, *, scale: float, precision: str,
) -> None:  # fmt: skip
    """Fills out [T, H, D], T > 0, and the new tokens' places in the pages; rows of q, k and v are contiguous."""
    scaled = page_scales is not None
    held = {"pages": pages, "page_scales": page_scales if scaled else out, "page_stride": pages.stride(0),
            "scales_stride": page_scales.stride(0) if scaled else 0, "SCALED": scaled}  # fmt: skip
    (t, heads, dims), n, page_size = q.shape, len(lengths), pages.shape[3]
    width, runs, steps = page_table.shape[1], len(shared), n.bit_length()
    split = SPLIT if t <= FEW_ROWS else 0
    splits = triton.cdiv(width * page_size, split) if split else 1
    slots = splits + depth
    turned = torch.empty_like(out)
    part_sums = out.new_empty(t, heads, slots, dims, dtype=torch.float32)
    part_tops = out.new_empty(t, heads, slots, dtype=torch.float32)
    part_totals = torch.zeros_like(part_tops)  # 0: no part in this slot
    parts = {"part_sums": part_sums, "part_tops": part_tops, "part_totals": part_totals}
    tokens = {**held, "queries": queries, "page_table": page_table, "table_width": width, "N": n, "steps": steps,
              "H": heads, "D": dims, "PAGE": page_size}  # fmt: skip
    kernels.prefix_attention_append_kernel[(t, heads)](
        q, k, v, **tokens, lengths=lengths, positions=queries if positions is None else positions,
        rotary=turned if rotary is None else rotary, turned=turned, q_stride=q.stride(0), k_stride=k.stride(0),
        v_stride=v.stride(0), ROTARY=0 if rotary is None else rotary.shape[1], HAS_POSITIONS=positions is not None,
        BLOCK_D=block_of(dims), num_warps=1,
    )  # fmt: skip
    how = {**tokens, **parts, "turned": turned, "splits": splits, "slots": slots, "scale": scale, "SPLIT": split,
           "PRECISION": precision}  # fmt: skip
    if runs:
        starts, blocks = torch.empty_like(queries), tiles(t, q.dtype, dims)
        kernels.prefix_attention_starts_kernel[(1,)](queries, order, starts, n, BLOCK=256)
        row_tiles = triton.cdiv(t, blocks["BLOCK_M"])
        kernels.prefix_attention_shared_kernel[(row_tiles * splits * runs, heads)](
            order=order, shared=shared, starts=starts, tiles=row_tiles, **how, **blocks
        )
    blocks = tiles(t // n, q.dtype, dims)
    kernels.prefix_attention_alone_kernel[(splits * (t // blocks["BLOCK_M"] + n), heads)](
        lengths=lengths, private=private, depth=depth, **how, **blocks
    )
    kernels.prefix_attention_merge_kernel[(t * heads,)](
        **parts, out=out, D=dims, slots=slots, BLOCK_D=block_of(dims), num_warps=1
    )
