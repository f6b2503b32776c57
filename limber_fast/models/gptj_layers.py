"""The frozen layers of GPT-J: linear maps in int8 or in floating point, LayerNorm, and the block of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limber_fast import checks
from limber_fast.models.gptj_config import GPTJConfig
from limber_fast.ops.int8_linear import int8_linear, unchecked_int8_linear
from limber_fast.ops.int8_weight import Int8Weight

_OP = "GPTJ"
KINDS, COMPUTE = ("float", "int8"), ("w8a16", "w8a8")


@dataclass
class Precision:
    """How a model's linear maps are stored and multiplied; shared by all of them, so that a change reaches each.

    Attributes:
        weights: 'int8' or 'float'. dtype: of activations, and of weights in floating point.
        compute, outlier_threshold: of `limber_fast.int8_linear`.
        kv_cache: 'float', keys and values in the activations' dtype, or 'int8'.
        embedding: 'float', rows in the activations' dtype, or 'int8', each with a scale of its own.
    """

    weights: str = "int8"
    dtype: torch.dtype = torch.bfloat16
    compute: str = "w8a16"
    outlier_threshold: float = 6.0
    kv_cache: str = "float"
    embedding: str = "float"

    def __post_init__(self) -> None:
        for name in ("weights", "kv_cache", "embedding"):
            checks.choice(_OP, name, getattr(self, name), KINDS)
        checks.choice(_OP, "compute", self.compute, COMPUTE)
        checks.not_negative(_OP, "outlier_threshold", self.outlier_threshold)
        checks.model_dtype(_OP, self.dtype)


class FrozenLinear(nn.Module):
    """activation(x W^T + bias) + residual; W [N, K] int8 or floating point, several matrices stacked along N.

    Its tensors are buffers: no optimiser finds them, and no gradient reaches them.
    """

    def __init__(self, n: int, k: int, bias: bool, precision: Precision, device: torch.device | str | None):
        super().__init__()
        self.precision = precision
        if precision.weights == "int8":
            self.weight = Int8Weight(n, k, device)
        else:
            self.register_buffer("weight", torch.empty(n, k, dtype=precision.dtype, device=device))
        wide = torch.float32 if precision.weights == "int8" else precision.dtype  # the kernels' epilogue is in fp32
        self.register_buffer("bias", torch.empty(n, dtype=wide, device=device) if bias else None)

    def forward(
        self, x: Tensor, activation: str | None = None, residual: Tensor | None = None,
        linear: Callable[..., Tensor] = int8_linear,
    ) -> Tensor:  # fmt: skip
        """linear: what multiplies in int8; unchecked_int8_linear for operands that the model made itself."""
        if isinstance(self.weight, Int8Weight):
            how = self.precision
            return linear(
                x, self.weight, self.bias, activation=activation, residual=residual, compute=how.compute,
                outlier_threshold=how.outlier_threshold,
            )  # fmt: skip
        y = F.linear(x, self.weight, self.bias)
        if activation is not None:
            y = F.gelu(y, approximate="tanh")
        return y if residual is None else y + residual


class FrozenLayerNorm(nn.Module):
    def __init__(self, width: int, eps: float, dtype: torch.dtype, device: torch.device | str | None):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.empty(width, dtype=dtype, device=device))
        self.register_buffer("bias", torch.empty(width, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class Adapter(nn.Module):
    """m + up(relu(down(m))) behind an MLP: MAGMA's bottleneck, the one part of a GPT-J that can be trained.

    Parameters in the dtype they are given; products run in the activations' dtype.
    """

    def __init__(self, width: int, inner: int, dtype: torch.dtype, device: torch.device | str | None):
        super().__init__()
        self.down = nn.Linear(width, inner, dtype=dtype, device=device)
        self.up = nn.Linear(inner, width, dtype=dtype, device=device)
        self.requires_grad_(False)

    def forward(self, m: Tensor, residual: Tensor) -> Tensor:
        """residual + m + up(relu(down(m))), all [T, E]."""
        down, bottom, up, top = (
            x.to(m.dtype) for x in (self.down.weight, self.down.bias, self.up.weight, self.up.bias)
        )
        inner = F.relu(F.linear(m, down, bottom))
        return F.linear(inner, up, top).add_(m).add_(residual)


class Block(nn.Module):
    """h = ln_1(x); x + out_proj(attention(q, k, v of h)) + fc_out(gelu_new(fc_in(h))), as GPT-J has it; with an adapter
    what fc_out gives goes through it.

    q, k and v are one product; each residual sum is the epilogue of the product before it.
    """

    def __init__(self, config: GPTJConfig, precision: Precision, device: torch.device | str | None):
        super().__init__()
        width, inner = config.n_embd, config.inner
        self.ln_1 = FrozenLayerNorm(width, config.layer_norm_epsilon, precision.dtype, device)
        self.qkv = FrozenLinear(3 * width, width, False, precision, device)
        self.out_proj = FrozenLinear(width, width, False, precision, device)
        self.fc_in = FrozenLinear(inner, width, True, precision, device)
        self.fc_out = FrozenLinear(width, inner, True, precision, device)
        inner = config.adapter_width
        self.adapter = None if inner is None else Adapter(width, inner, precision.dtype, device)

    def forward(self, x: Tensor, attend: Callable[[Tensor], Tensor], rows: Tensor | None = None) -> Tensor:
        """x [T, E] -> [T, E]; `attend` maps q|k|v [T, 3 E] to [T, E]. rows: [R] integers: [R, E] of these alone."""
        h, own = self.ln_1(x), unchecked_int8_linear
        attended = attend(self.qkv(h, linear=own))
        if rows is not None:
            x, h, attended = (t.index_select(0, rows) for t in (x, h, attended))
        x = self.out_proj(attended, residual=x, linear=own)
        h = self.fc_in(h, activation="gelu_new", linear=own)
        if self.adapter is None:
            return self.fc_out(h, residual=x, linear=own)
        return self.adapter(self.fc_out(h, linear=own), x)
