"""Launchers of the int8_linear kernels, and their tiles: one row per chip and arithmetic, a reason beside each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from limber_fast.kernels import int8_linear as forward
from limber_fast.kernels import int8_linear_bwd as backward
from limber_fast.kernels.info_nce_configs import Tiles
from limber_fast.kernels.info_nce_launch import tma_can_read

GROUP, OUTLIERS, ROW_BLOCK = 8, 32, 2048
_FINISH = {"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 8}  # 4 warps spill a register on sm_100 in fp32
LEAST_STEPS = 8  # of the reduction that a program gets: fewer do not fill the pipeline


@dataclass(frozen=True)
class Config:
    """Tiles of tokens x output channels (backward: x features), and whether their operands come by TMA."""

    tiles: Tiles
    tma: bool


# Up to 16 tokens the weight's bytes are all that counts: 4 stages of 8 KiB in 4 programs keep 128 KiB of a
# multiprocessor's loads on their way, and rows of so few tokens need no TMA.
_DECODE = Config(Tiles(16, 64, 128, 4, 4), False)
_DECODE_AMPERE_32 = Config(Tiles(16, 64, 64, 4, 4), False)  # a step of 128 spills 2, of ragged rows 48
_HOPPER = {"int8": Tiles(128, 128, 128, 8, 3), "16": Tiles(128, 128, 64, 8, 3), "32": Tiles(64, 128, 64, 8, 3)}
# Rows in or out that are not whole 16 bytes: at 128 x 128 they spill 49 registers on sm_100, with 4 warps 20.
_RAGGED = Config(Tiles(64, 128, 64, 8, 3), False)
_RAGGED_AMPERE = Config(Tiles(64, 64, 32, 4, 3), False)  # 128 x 128 and 64 x 128 spill 55 to 117
_AMPERE = {"int8": Tiles(128, 128, 64, 8, 3), "16": Tiles(128, 128, 32, 8, 4), "32": Tiles(64, 64, 32, 8, 3)}
_ADA_INT8_OF_32 = Tiles(128, 64, 64, 8, 3)  # 128 columns spill 9 on sm_89


def choose(
    capability: tuple[int, int], dtype: torch.dtype, tokens: int, aligned: bool, full: bool = False
) -> Config:  # fmt: skip
    """The row for a chip, the dtype of activations as they are multiplied, their number, whether TMA can read, and
    whether int8 ones are those of fp32 rows."""
    kind = {torch.int8: "int8", torch.float32: "32"}.get(dtype, "16")
    hopper = capability[0] >= 9
    if tokens <= 16:
        return _DECODE if hopper or kind != "32" else _DECODE_AMPERE_32
    if not aligned:
        return _RAGGED if hopper else _RAGGED_AMPERE
    tiles = (_HOPPER if hopper else _AMPERE)[kind]
    if tokens <= 64 < tiles.BLOCK_M:  # with 8 warps the backward pass spills a register on sm_100
        # With the fp32 rows of W8A8 at hand 128 columns of int8 products spill 12 on sm_80.
        columns = tiles.BLOCK_N if hopper or kind != "int8" else 64
        tiles = Tiles(64, columns, tiles.BLOCK_K, 4, tiles.stages)
    elif full and (8, 0) < capability < (9, 0) and kind == "int8":
        tiles = _ADA_INT8_OF_32
    return Config(tiles, hopper and aligned)


@dataclass(frozen=True)
class Weight:
    """The weight as it lies on a GPU.

    Args:
        rows: [N, K up to a multiple of 64] int8, zeros beyond K.
        scales: [N] fp32; row_sums: [N] int32.
        K: features.
        capability, programs: of the chip: see backends/triton/device.py.
    """

    rows: Tensor
    scales: Tensor
    row_sums: Tensor
    K: int
    capability: tuple[int, int]
    programs: int

    def part(self, first: int, last: int) -> Weight:
        """Some output channels."""
        cut = slice(first, last)
        return Weight(self.rows[cut], self.scales[cut], self.row_sums[cut], self.K, self.capability, self.programs)

    @property
    def magic(self) -> bool:
        return self.capability[0] < 9

    def splits(self, tiles: int, blocks: int, decode: bool) -> int:
        """Programs that share a tile's reduction of `blocks` steps."""
        wanted = (2 if decode else 1) * self.programs // tiles
        return triton.cdiv(blocks, max(LEAST_STEPS, triton.cdiv(blocks, max(1, wanted))))


def _tile_options(config: Config) -> dict[str, Any]:
    tiles = config.tiles
    return {"BLOCK_M": tiles.BLOCK_M, "BLOCK_N": tiles.BLOCK_N, "BLOCK_K": tiles.BLOCK_K, "GROUP": GROUP,
            "TMA": config.tma, "STAGES": tiles.stages, "num_warps": tiles.num_warps,
            "num_stages": tiles.stages}  # fmt: skip


def quantize(x: Tensor, padded: int, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Integers less 128 [M, padded], steps and zeros [2, M], and the columns with outliers [1 + K], how many first."""
    m, k = x.shape
    q = x.new_empty(m, padded, dtype=torch.int8)
    rounding = x.new_empty(2, m, dtype=torch.float32)
    flags, outliers = (x.new_empty(k + i, dtype=torch.int32) for i in range(2))
    flags.zero_()
    block = min(ROW_BLOCK, max(64, triton.next_power_of_2(k)))
    forward.int8_linear_quantize_kernel[(m,)](
        x, q, rounding, flags, m, k, padded, x.stride(0), threshold, BLOCK=block, num_warps=max(1, block // 512)
    )
    forward.int8_linear_outliers_kernel[(1,)](flags, outliers, k, BLOCK=1024)
    return q, rounding, outliers


def int8_linear_fwd(
    x: Tensor, weight: Weight, bias: Tensor | None, residual: Tensor | None, out: Tensor, kept: Tensor | None, *,
    gelu: bool, w8a8: bool = False, threshold: float = 0.0,
) -> None:  # fmt: skip
    """Fills out [M, N] and kept, the argument of gelu_new; x [M, K] and residual are contiguous along a row."""
    m, n = out.shape
    padded, depth = weight.rows.shape[1], weight.K
    source, rounding, outliers = x, weight.scales, weight.row_sums
    if w8a8:
        x, rounding, outliers = quantize(x, padded, threshold)
        depth = padded
    config = choose(weight.capability, x.dtype, m, tma_can_read(x, weight.rows, out, residual),
                    source.dtype == torch.float32)  # fmt: skip
    tiles = config.tiles
    num_m, num_n = triton.cdiv(m, tiles.BLOCK_M), triton.cdiv(n, tiles.BLOCK_N)
    blocks = triton.cdiv(depth, tiles.BLOCK_K)
    splits = weight.splits(num_m * num_n, blocks, m <= 16)
    part = out.new_empty(splits, m, n, dtype=torch.int32 if w8a8 else torch.float32) if splits > 1 else weight.scales
    nothing = weight.scales
    tensors = (weight.rows, weight.scales, weight.row_sums, rounding, source, outliers,
               nothing if bias is None else bias, nothing if residual is None else residual, out,
               nothing if kept is None else kept)  # fmt: skip
    strides = (padded, source.stride(0), 0 if residual is None else residual.stride(0), threshold)
    flags = {"W8A8": w8a8, "HAS_BIAS": bias is not None, "HAS_GELU": gelu, "HAS_RESIDUAL": residual is not None,
             "HAS_KEPT": kept is not None, "OUTLIERS": OUTLIERS, "MAGIC": weight.magic}  # fmt: skip
    forward.int8_linear_fwd_kernel[(num_m * num_n, splits)](
        x, *tensors, part, m, n, depth, x.stride(0), *strides, num_m, num_n, blocks, splits, **flags, SPLIT=splits > 1,
        EVEN_K=depth % tiles.BLOCK_K == 0, **_tile_options(config),
    )  # fmt: skip
    if splits > 1:
        num_m, num_n = triton.cdiv(m, _FINISH["BLOCK_M"]), triton.cdiv(n, _FINISH["BLOCK_N"])
        forward.int8_linear_finish_kernel[(num_m * num_n,)](
            part, *tensors, splits, m, n, *strides, num_m, num_n, **flags, **_FINISH
        )


def fold_scales(grad: Tensor, preactivation: Tensor | None, weight: Weight) -> tuple[Tensor, Tensor]:
    """g [M, N up to a multiple of 64] and the factor of each row: dY gelu_new' s = factor g."""
    m, n = grad.shape
    padded = triton.cdiv(n, 64) * 64
    g, factor = grad.new_empty(m, padded), grad.new_empty(m, dtype=torch.float32)
    block = min(ROW_BLOCK, max(64, triton.next_power_of_2(n)))
    backward.int8_linear_grad_kernel[(m,)](
        grad, grad if preactivation is None else preactivation, weight.scales, g, factor, n, padded, grad.stride(0),
        HAS_GELU=preactivation is not None, BLOCK=block, num_warps=max(1, block // 512),
    )  # fmt: skip
    return g, factor


def int8_linear_bwd(g: Tensor, factor: Tensor, weight: Weight, out: Tensor, *, accumulate: bool = False) -> None:
    """out [M, K] = factor (g q), or with `accumulate` g q + factor out; g [M, .] of rows of whole 128 bytes."""
    m, k = out.shape
    n, padded = weight.rows.shape
    # g and the weight can always be read by TMA; rows of `out` that are not whole 16 bytes spill 83 on sm_80.
    config = choose(weight.capability, g.dtype, max(m, 17), not weight.magic or tma_can_read(out))
    tiles = config.tiles
    num_m, num_n = triton.cdiv(m, tiles.BLOCK_M), triton.cdiv(k, tiles.BLOCK_N)
    blocks = triton.cdiv(n, tiles.BLOCK_K)
    splits = weight.splits(num_m * num_n, blocks, False)
    part = out.new_empty(splits, m, k, dtype=torch.float32) if splits > 1 else factor
    backward.int8_linear_bwd_kernel[(num_m * num_n, splits)](
        g, weight.rows, factor, out, part, m, n, k, g.stride(0), padded, num_m, num_n, blocks, splits,
        HAS_OLD=accumulate, SPLIT=splits > 1, MAGIC=weight.magic, **_tile_options(config),
    )  # fmt: skip
    if splits > 1:
        num_m, num_n = triton.cdiv(m, _FINISH["BLOCK_M"]), triton.cdiv(k, _FINISH["BLOCK_N"])
        backward.int8_linear_bwd_finish_kernel[(num_m * num_n,)](
            part, factor, out, splits, m, k, num_m, HAS_OLD=accumulate, **_FINISH
        )
