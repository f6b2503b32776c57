"""Launchers of the project_concat kernels, and their tiles: one row per arithmetic, a reason beside each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from limber_fast.kernels import project_concat as kernels
from limber_fast.kernels.info_nce_configs import Tiles

TOKENS, GROUP = 4, 8
_STEP, _MASK = 0x9E3779B97F4A7C15, 2**64 - 1


@dataclass(frozen=True)
class Config:
    """Tiles of the projection (soft prompts x E) and of the two gradients; whether the projection reads by TMA."""

    forward: Tiles
    gradient: Tiles
    tma: bool


# The projection has a light epilogue: a wide tile, whose K fits TMA's 128 bytes. The gradients make the dropout mask of
# each operand anew beside the product: 128 x 128 and a short K keep that in registers.
_HOPPER_16 = Config(Tiles(128, 128, 64, 8, 3), Tiles(128, 128, 32, 8, 3), True)
_AMPERE_16 = Config(Tiles(128, 128, 32, 8, 4), Tiles(128, 64, 32, 8, 3), False)
# Rows that are not whole 16 bytes, on any chip: at 128 x 128 their masks spill 54 registers on sm_100.
_RAGGED_16 = Config(Tiles(128, 64, 32, 8, 4), Tiles(128, 64, 32, 8, 3), False)
# fp32 on sm_80: 8 warps in tf32's gradients spill a register beside the mask (on sm_100 4 do), as three stages do in
# the IEEE projection.
_TF32 = Config(Tiles(128, 64, 32, 8, 3), Tiles(64, 64, 32, 4, 3), False)
_TF32_BLACKWELL = Config(Tiles(128, 64, 32, 8, 3), Tiles(64, 64, 32, 8, 3), False)
_IEEE = Config(Tiles(64, 64, 16, 4, 2), Tiles(64, 64, 16, 8, 2), False)


def choose(capability: tuple[int, int], dtype: torch.dtype, precision: str, aligned: bool) -> Config:
    """The row for a chip, the features' dtype, for fp32 'ieee' or 'tf32', and whether TMA can read the operands."""
    if dtype == torch.float32:
        if precision != "tf32":
            return _IEEE
        return _TF32_BLACKWELL if capability[0] >= 10 else _TF32
    if not aligned:
        return _RAGGED_16
    return _HOPPER_16 if capability[0] >= 9 else _AMPERE_16


@dataclass(frozen=True)
class Projection:
    """What both passes are told.

    Args:
        features: [rows, D], weight: [E, D], contiguous in D; bias: [E] or None.
        seed, threshold, factor: of dropout; factor 1 and threshold 0 for none.
    """

    features: Tensor
    weight: Tensor
    bias: Tensor | None
    seed: int
    threshold: int
    factor: float
    config: Config
    precision: str

    @property
    def start(self) -> int:
        """splitmix64's finaliser of seed + STEP as a signed number: every row's key begins with it."""
        z = (self.seed + _STEP) & _MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        z ^= z >> 31
        return z - 2**64 if z >= 2**63 else z

    def dropout(self) -> dict[str, int | float | bool]:
        return {"start": self.start, "threshold": self.threshold, "factor": self.factor,
                "HAS_DROPOUT": self.threshold > 0}  # fmt: skip

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.features.dtype, device=self.features.device)

    def options(self, tiles: Tiles) -> dict[str, int | str]:
        return {"BLOCK_M": tiles.BLOCK_M, "BLOCK_N": tiles.BLOCK_N, "BLOCK_K": tiles.BLOCK_K, "GROUP": GROUP,
                "PRECISION": self.precision, "STAGES": tiles.stages, "num_warps": tiles.num_warps,
                "num_stages": tiles.stages}  # fmt: skip


def project(
    p: Projection, out: Tensor, positions: Tensor, *, input_ids: Tensor | None = None, image_token_id: int = 0,
    embedding: Tensor | None = None, scales: Tensor | None = None,
) -> None:  # fmt: skip
    """Soft prompts into rows `positions` of out [., E]; with input_ids the text's rows beside them, in one launch."""
    rows, d = p.features.shape
    e, tiles = p.weight.shape[0], p.config.forward
    num_m, num_n = triton.cdiv(rows, tiles.BLOCK_M), triton.cdiv(e, tiles.BLOCK_N)
    tokens = 0 if input_ids is None else input_ids.numel()
    dropout = p.dropout()
    nothing = p.weight
    kernels.project_concat_fwd_kernel[(num_m * num_n + triton.cdiv(tokens, TOKENS),)](
        p.features, p.weight, nothing if p.bias is None else p.bias, positions,
        positions if input_ids is None else input_ids, nothing if embedding is None else embedding,
        nothing if scales is None else scales, out, rows, d, e, tokens, p.features.stride(0), p.weight.stride(0),
        0 if embedding is None else embedding.stride(0), image_token_id, dropout.pop("start"), dropout.pop("threshold"),
        dropout.pop("factor"), num_m, num_n, num_m * num_n, HAS_BIAS=p.bias is not None, HAS_TEXT=input_ids is not None,
        HAS_SCALES=scales is not None, TOKENS=TOKENS, TMA=p.config.tma, EVEN_K=d % tiles.BLOCK_K == 0, **dropout,
        **p.options(tiles),
    )  # fmt: skip


def normalise(out: Tensor, positions: Tensor, ln_weight: Tensor | None, ln_bias: Tensor | None, eps: float) -> None:
    """LayerNorm of rows `positions` of out [., E], in place."""
    kernels.project_concat_norm_kernel[(positions.numel(),)](
        out, positions, out if ln_weight is None else ln_weight, out if ln_bias is None else ln_bias, out.shape[1], eps,
        HAS_WEIGHT=ln_weight is not None, HAS_BIAS=ln_bias is not None, BLOCK=1024,
    )  # fmt: skip


def through_norm(
    p: Projection, grad: Tensor, places: Tensor, ln_weight: Tensor | None, eps: float, programs: int, parts: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradient [rows, E] before LayerNorm and dropout, and those of the norm's weight and bias (fp32)."""
    rows, e = p.features.shape[0], p.weight.shape[0]
    prompts = p.new(rows, e)
    project(p, prompts, torch.arange(rows, device=prompts.device))
    programs = max(1, min(rows, programs))
    # 4 warps spill two registers on sm_100 under Triton 3.6.
    weight_part, bias_part = (p.new(programs, e if parts else 0, dtype=torch.float32) for _ in range(2))
    kernels.project_concat_norm_bwd_kernel[(programs,)](
        grad, places, prompts, prompts if ln_weight is None else ln_weight, weight_part, bias_part, rows, e, eps,
        HAS_WEIGHT=ln_weight is not None, HAS_PARTS=parts, BLOCK=1024, **p.dropout(), num_warps=8,
    )  # fmt: skip
    return prompts, weight_part.sum(0) if parts else None, bias_part.sum(0) if parts else None


def gradients(
    p: Projection, grad: Tensor, places: Tensor, dropped: bool, *, need_features: bool, need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """d_features [rows, D], d_weight, d_bias from the gradient whose row r begins at places[r]; dropped: mask it."""
    rows, d = p.features.shape
    e, tiles = p.weight.shape[0], p.config.gradient
    options = {**p.dropout(), **p.options(tiles)}
    options["HAS_DROPOUT"] = options["HAS_DROPOUT"] and dropped
    d_features = p.new(rows, d) if need_features else None
    d_weight, d_bias = p.new(e, d) if need_weight else None, p.new(e) if need_bias else None
    num_n = triton.cdiv(d, tiles.BLOCK_N)
    if need_weight or need_bias:
        num_m, columns = triton.cdiv(e, tiles.BLOCK_M), num_n if need_weight else 1
        kernels.project_concat_weight_kernel[(num_m * columns,)](
            grad, places, p.features, grad if d_weight is None else d_weight, grad if d_bias is None else d_bias, rows,
            d, e, p.features.stride(0), num_m=num_m, num_n=columns, HAS_WEIGHT=need_weight, HAS_BIAS=need_bias,
            **options,
        )  # fmt: skip
    if d_features is not None:
        num_m = triton.cdiv(rows, tiles.BLOCK_M)
        kernels.project_concat_features_kernel[(num_m * num_n,)](
            grad, places, p.weight, d_features, rows, d, e, p.weight.stride(0), num_m=num_m, num_n=num_n, **options
        )
    return d_features, d_weight, d_bias
