"""Tile shapes of the info_nce kernels per chip and arithmetic: one table, a reason beside each row.

A row was admitted only if all its kernels compile for the chip without a spilled register and within its shared memory
(tests/gpu). No row has been timed on a GPU yet: where two were admitted, the modelled one decides.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton


@dataclass(frozen=True)
class Tiles:
    """One kernel's tile: M x N of the result (for the two products: rows x features), K a step of the reduction.

    `pieces`: the forward's exponentials are taken for one piece of the columns after another (1 or 2). `kept`: warps
    along the rows, where every thread keeps its own column sums over a strip of tiles; 0: strips are single tiles.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    stages: int
    pieces: int = 1
    kept: int = 0


@dataclass(frozen=True)
class Config:
    """Tiles of the forward, of dS and of the two products.

    `narrow` replaces the forward's where options (statistics, smoothing) keep more values beside the accumulator, with
    `sigmoid_narrow` the sigmoid's, whose warps are then `sigmoid_warps` if given, and dS's of 16-bit towers with
    smoothing. `forward_crowded`: with ids or norms, and of the sigmoid; `ds_crowded`: with labels, ids or norms.
    `redo`, `separate`: of the tiles of the forward and of dS that need two exponentials, within theirs; by default the
    same with eight warps. `tensor_memory`: accumulators come to registers from there, a row a thread.
    """

    forward: Tiles
    ds: Tiles
    dual: Tiles
    narrow: Tiles
    tma: bool
    group: int = 8
    sigmoid_narrow: bool = False
    forward_crowded: Tiles | None = None
    ds_crowded: Tiles | None = None
    redo: Tiles | None = None
    separate: Tiles | None = None
    sigmoid_warps: int = 0
    tensor_memory: bool = False


_HOPPER_16 = Config(
    # Four warps and two programs a multiprocessor: 32 rows a warp halve the shuffles of column sums, and one program's
    # epilogue hides under the other's products. Around a tile's products, 5328 cycles at D = 512, stand 1312, of them
    # 1026 of exponentials (the maximum of a strip's first tile is not counted: 160 instructions in 8 tiles). Column
    # sums of single tiles took 2336: 1496 in 374 shuffles a thread. In one piece a strip's spill 16 registers.
    forward=Tiles(128, 128, 64, 4, 3, pieces=2, kept=4),
    ds=Tiles(128, 128, 64, 4, 3),
    separate=Tiles(128, 64, 64, 8, 3),  # at 128 x 128 norms spill 5
    # The products' epilogue is their fp32 accumulators' way to L2, which adds them up: 1096 cycles to 87918; loaded,
    # added and stored through shared memory they took 4576. The widest tile halves what L2 must deliver.
    dual=Tiles(128, 256, 64, 8, 4),
    # At 128 x 128 the statistics spill 1724 registers.
    narrow=Tiles(128, 64, 64, 8, 3),
    tma=True,
)
# fp16 needs more registers than bf16: redone tiles spill 6 to 73 at 128 x 128, the forward with ids 32 with four warps.
_HOPPER_FP16 = replace(
    _HOPPER_16, forward_crowded=Tiles(128, 128, 64, 8, 3), redo=Tiles(128, 64, 64, 8, 3)
)
# Other compilers than Triton 3.8 need more registers: with four warps 3.6 spills 2 (forward) and 53 (dS), 3.9 6 in the
# forward; 5 in the sigmoid's forward with eight, 1 with norms. 3.6 spills 94 with all options at 128 x 64.
_HOPPER_16_EIGHT_WARPS = replace(
    _HOPPER_16, forward=Tiles(128, 128, 64, 8, 3), ds=Tiles(128, 128, 64, 8, 3), sigmoid_narrow=True,
    forward_crowded=Tiles(128, 64, 64, 8, 3), narrow=Tiles(128, 32, 64, 8, 3),
)  # fmt: skip
# Accumulators live in tensor memory and come to registers a row a thread: column sums of one tile cost five shuffles a
# value, kept over a strip one addition (2.7 times the modelled rate). What limits it then is L2's way into an SM: 64
# bytes a cycle feed 54% of the tensor cores at 128 x 128, 71% at 256 x 128. The forward's sums need all registers there
# is at 128 x 128, and dS's take 35 too many with labels, ids or norms at 256 x 128 (with norms 49 at 128 x 128).
_BLACKWELL_16 = Config(
    forward=Tiles(128, 128, 64, 8, 4, kept=4),
    forward_crowded=Tiles(128, 64, 64, 8, 4, kept=4),
    redo=Tiles(128, 32, 64, 8, 4),
    ds=Tiles(256, 128, 64, 8, 4),
    ds_crowded=Tiles(128, 64, 64, 8, 4),
    separate=Tiles(128, 32, 64, 8, 4),
    dual=Tiles(256, 128, 64, 8, 4),
    narrow=Tiles(128, 32, 64, 8, 4),
    tma=True,
    tensor_memory=True,
)
_AMPERE_16 = Config(
    # As sums of single tiles the column sums' shuffles took shared memory 1.14 times as long as the products took, at
    # D = 512. With four warps 165 spill.
    forward=Tiles(128, 128, 32, 8, 4, kept=2),
    ds=Tiles(128, 128, 32, 8, 4),
    dual=Tiles(128, 128, 32, 8, 4),
    narrow=Tiles(128, 64, 32, 8, 4),
    tma=False,
)
# 8.6 and 8.9: at 128 x 64 the statistics spill 44 registers, at 128 x 128 the sigmoid 4.
_ADA_16 = replace(_AMPERE_16, narrow=Tiles(128, 32, 32, 8, 4), sigmoid_narrow=True)
# Rows that are not whole 16 bytes, on any chip: the masks of such loads take the registers of half a tile (at
# 128 x 128 the products spill 1 to 7).
_RAGGED_16 = replace(
    _AMPERE_16, forward=Tiles(128, 128, 32, 8, 4), dual=Tiles(128, 64, 32, 8, 4), separate=Tiles(128, 64, 32, 8, 4)
)  # fmt: skip
_RAGGED_FP16 = replace(_RAGGED_16, ds=Tiles(128, 64, 32, 8, 4))  # on sm_90 1 and 7 spill at 128 x 128
_RAGGED_BLACKWELL_16 = replace(
    _RAGGED_16, forward=Tiles(128, 32, 32, 8, 4), ds=Tiles(128, 32, 32, 8, 4), narrow=Tiles(128, 32, 32, 8, 4)
)
# fp32 operands are twice the bytes: half the K per stage. On sm_90 dS spills 34 registers at 128 x 128.
_TF32 = Config(
    forward=Tiles(128, 128, 32, 8, 3),
    ds=Tiles(128, 64, 32, 8, 3),
    dual=Tiles(128, 64, 32, 8, 3),
    narrow=Tiles(64, 64, 32, 8, 3),
    tma=False,
)
# On sm_90 128 x 128 spills 20; 3.6 7 with all options at 64 x 64.
_RAGGED_TF32 = replace(_TF32, forward=Tiles(128, 64, 32, 8, 3), narrow=Tiles(64, 32, 32, 8, 3))
# IEEE products run on the FMA pipe, whose operands are registers: small tiles.
_IEEE = Config(
    forward=Tiles(64, 64, 16, 4, 2),
    ds=Tiles(64, 64, 16, 4, 2),
    dual=Tiles(64, 64, 16, 8, 2),
    narrow=Tiles(64, 32, 16, 4, 2),
    tma=False,
)
# On sm_90 3.9 spills 3 at 64 x 64 in the sigmoid's dS, with eight warps 1 to 4 in tiles with two exponentials; 3.6 2 at
# 64 x 32.
_IEEE_NARROW = replace(
    _IEEE, ds=Tiles(32, 32, 16, 4, 2), separate=Tiles(32, 32, 16, 4, 2), redo=Tiles(64, 32, 16, 4, 2)
)  # fmt: skip
# The products spill 2 to 5 with eight warps, on sm_90 with four; dS with all options 1 at 64 x 64.
_AMPERE_IEEE = replace(_IEEE, dual=Tiles(64, 64, 16, 4, 2), ds_crowded=Tiles(64, 32, 16, 4, 2))
_RAGGED_AMPERE_IEEE = replace(_IEEE, dual=Tiles(64, 32, 16, 4, 2))  # 4 at 64 x 64
# Tensor memory again: at the tiles above tf32 spills up to 318 registers, and dS of ragged fp32 rows 22.
_TF32_BLACKWELL = Config(
    forward=Tiles(128, 64, 32, 8, 3),
    ds=Tiles(128, 32, 32, 8, 3),
    dual=Tiles(128, 64, 32, 8, 3),
    narrow=Tiles(128, 32, 32, 8, 3),
    tma=False,
    redo=Tiles(128, 32, 32, 8, 3),
    sigmoid_warps=4,  # with eight ids spill 2
)
# With four warps the sigmoid spills 1, as do ids at 64 x 64.
_IEEE_BLACKWELL = replace(_IEEE, narrow=Tiles(64, 32, 16, 8, 2), forward_crowded=Tiles(64, 32, 16, 8, 2))
_RAGGED_IEEE_BLACKWELL = replace(
    _IEEE_BLACKWELL, ds=Tiles(64, 64, 16, 8, 2), separate=Tiles(64, 32, 16, 8, 2)
)


def choose(capability: tuple[int, int], dtype: torch.dtype, precision: str, aligned: bool) -> Config:
    """The row for a chip (compute capability), the towers' dtype, for fp32 'ieee' or 'tf32', and whether TMA can read
    the towers (rows and pointers of whole 16 bytes).
    """
    blackwell, hopper = capability[0] >= 10, capability[0] == 9
    known = triton.__version__.startswith("3.8.")
    if dtype == torch.float32 and precision == "tf32":
        # At 128 x 128 3.9 spills 19 on sm_90.
        if blackwell:
            return _TF32_BLACKWELL
        return _TF32 if aligned and (known or not hopper) else _RAGGED_TF32
    if dtype == torch.float32:
        if hopper and not known:
            return _IEEE_NARROW
        if blackwell:
            return _IEEE_BLACKWELL if aligned else _RAGGED_IEEE_BLACKWELL
        if capability[0] == 8:
            return _AMPERE_IEEE if aligned else _RAGGED_AMPERE_IEEE
        return _IEEE
    if not aligned:
        if blackwell:
            return _RAGGED_BLACKWELL_16
        return _RAGGED_FP16 if dtype == torch.float16 else _RAGGED_16
    if blackwell:
        return _BLACKWELL_16
    if hopper:
        if not known:
            return _HOPPER_16_EIGHT_WARPS
        return _HOPPER_FP16 if dtype == torch.float16 else _HOPPER_16
    return _ADA_16 if capability > (8, 0) else _AMPERE_16
