"""int8_linear: a frozen linear map with int8 weights; bias, gelu_new and residual in its epilogue."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from limber_fast import checks, dispatch
from limber_fast.ops import registration
from limber_fast.ops.int8_linear_op import Int8LinearRequest
from limber_fast.ops.int8_weight import Int8Weight, quantize_int8

__all__ = ["Int8LinearRequest", "Int8Weight", "int8_linear", "quantize_int8"]

_OP = "int8_linear"


def typical_request(device: torch.device) -> Int8LinearRequest:
    """The call that `limber-fast env` asks the backends about."""
    return Int8LinearRequest(device, torch.bfloat16, 256, 4096, 28672, "w8a16")


def int8_linear(
    x: Tensor,
    weight: Int8Weight,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    compute: str = "w8a16",
    outlier_threshold: float = 6.0,
    backend: str = "auto",
) -> Tensor:
    """A linear map whose weight is int8 with one scale per output channel, frozen, with a fused epilogue.

    With the scales s and integers q of `weight`::

        y[..., n] = activation(s[n] sum_k x[..., k] q[n, k] + bias[n]) + residual[..., n]

    compute='w8a16' takes x in at least 16 bits, so that only the weight is rounded. The CPU kernels take each row in
    16-bit fixed point between its least and its largest element (elements of more than 32 times the row's root mean
    square, and such that are not finite, are multiplied in fp32), which is more precise than bf16 in the Euclidean norm
    of the row: with fp32 rows expect relative errors of some 1e-5.

    compute='w8a8' rounds x to 8 bits, row by row (LLM.int8 with an asymmetric range): the elements below
    `outlier_threshold` become ``x ~ step (u - zero)``, step = (high - low) / 255, zero = round(-low / step),
    u = round(x / step) + zero within 0..255, with low <= 0 <= high the row's range; the others are multiplied in fp32.
    A row's result does not depend on the rows beside it.

    Integer sums are exact in both modes: the same for any number of threads, and, but for roundings of the float
    epilogue, on every instruction set.

    Args:
        x: [..., K] fp16|bf16|fp32 (fp64 runs on the eager backend in w8a16). Any strides; one that is not contiguous
            in K is copied.
        weight: of shape (N, K), by `quantize_int8` or `Int8Weight.load`, on the device of `x`. Frozen, as is `bias`.
        bias: [N] fp16|bf16|fp32, or None.
        activation: None or 'gelu_new': z / 2 (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))), GPT-J's.
        residual: [..., N] in the dtype of `x`, added after the activation; or None.
        compute: 'w8a16' or 'w8a8'.
        outlier_threshold: of w8a8: elements of x of at least this magnitude keep their precision; 0 rounds all.
        backend: 'auto', 'cpu', 'cuda', 'triton' or 'eager'; see `limber_fast.use_backend`.

    Returns:
        y [..., N] in the dtype of `x`. Gradients reach x and residual: ``dx = (dy s) q`` in 16-bit fixed point on the
        CPU (as w8a16, also under w8a8, whose rounding counts as the identity); the weight is never dequantised as a
        whole. NaN and Inf propagate as in eager PyTorch.

    Under torch.autocast x and residual are cast as for nn.Linear, and so is the result.

    Saved for backward: references to the weight; not x. With an activation its argument [..., N] in the dtype of `x`.

    Raises:
        ValueError: a shape or value breaks the contract above; a bias that requires grad. TypeError: a dtype or kind
            does.
        BackendUnavailable: the named backend cannot run this call.
        RuntimeError: a second derivative, forward-mode differentiation, torch.vmap or a torch.func transform.

    Source: Dettmers et al., arXiv 2208.07339, sections 2 and 3.
    """
    checks.choice(_OP, "backend", backend, dispatch.CHOICES)
    checks.choice(_OP, "compute", compute, ("w8a16", "w8a8"))
    if activation is not None:
        checks.choice(_OP, "activation", activation, ("gelu_new",))
    checks.not_negative(_OP, "outlier_threshold", outlier_threshold)
    checks.int8_weight(_OP, weight, Int8Weight)
    checks.int8_operands(_OP, x, weight, weight.shape)
    x, residual = registration.autocast(x, residual)
    if bias is not None:
        checks.frozen_bias(_OP, bias, weight.shape[0], x)
    if residual is not None:
        checks.residual_stream(_OP, residual, weight.shape[0], x)
    return unchecked_int8_linear(
        x, weight, bias, activation=activation, residual=residual, compute=compute, outlier_threshold=outlier_threshold,
        backend=backend,
    )  # fmt: skip


def unchecked_int8_linear(
    x: Tensor, weight: Int8Weight, bias: Tensor | None, *, activation: str | None, residual: Tensor | None,
    compute: str, outlier_threshold: float, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """`int8_linear` for a caller whose operands have the right kinds, shapes and devices by construction: half of the
    Python of a call. Their dtypes are anybody's, who may cast a model."""
    x, residual = registration.autocast(x, residual)
    checks.supported_compute(_OP, x, compute)
    if bias is not None:
        bias = bias.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32).contiguous()
    n, k = weight.shape
    out, _ = registration.call(
        torch.ops.limber_fast.int8_linear_fwd.default,
        _rows(x, k), weight.packed, weight.scales, weight.row_sums, weight.column_sums, bias,
        None if residual is None else _rows(residual, n), activation, compute,
        float(outlier_threshold) or math.inf, False, dispatch.preferred(backend),
    )  # fmt: skip
    return out if x.ndim == 2 else out.reshape(*x.shape[:-1], n)


def _rows(x: Tensor, width: int) -> Tensor:
    x = x if x.ndim == 2 else x.reshape(-1, width)
    return x if x.stride(-1) == 1 else x.contiguous()
