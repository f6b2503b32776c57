"""`torch.ops.limber_fast.int8_linear_*`: schemas, fake kernels, autograd and vmap of the int8_linear op.

The public function, with its documentation and argument checks, is `limber_fast.ops.int8_linear.int8_linear`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from limber_fast import dispatch
from limber_fast.ops import registration

_EAGER = "the plain formula, limber_fast.reference.int8_linear, has every derivative"


class Int8LinearRequest(NamedTuple):
    """What a backend is told when it is asked whether it can run a call; in the backward pass N and K change places."""

    device: torch.device
    dtype: torch.dtype
    M: int
    K: int
    N: int
    compute: str


def _backend(backend: str, x: Tensor, n: int, compute: str) -> Any:
    return dispatch.select("int8_linear", Int8LinearRequest(x.device, x.dtype, *x.shape, n, compute), backend)


def _forward(
    x: Tensor, packed: Tensor, scales: Tensor, row_sums: Tensor, column_sums: Tensor, bias: Tensor | None,
    residual: Tensor | None, activation: str | None, compute: str, outlier_threshold: float, keep: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, preactivation = _backend(backend, x, scales.shape[0], compute).int8_linear_fwd(
        x, packed, scales, row_sums, bias, residual, activation=activation, compute=compute,
        outlier_threshold=outlier_threshold, keep=keep and activation is not None,
    )  # fmt: skip
    return out, x.new_empty(0) if preactivation is None else preactivation


def _forward_fake(
    x, packed, scales, row_sums, column_sums, bias, residual, activation, compute, outlier_threshold, keep, backend
):  # fmt: skip
    shape = (x.shape[0], scales.shape[0])
    return x.new_empty(shape), x.new_empty(shape if keep and activation is not None else 0)


def _backward(
    grad: Tensor, packed: Tensor, scales: Tensor, column_sums: Tensor, preactivation: Tensor | None, backend: str
) -> Tensor:
    return _backend(backend, grad, len(column_sums), "w8a16").int8_linear_bwd(
        grad if grad.stride(-1) == 1 else grad.contiguous(), packed, scales, column_sums, preactivation
    )


def _backward_fake(grad, packed, scales, column_sums, preactivation, backend):
    return grad.new_empty(grad.shape[0], column_sums.shape[0])


class _Int8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        _, packed, scales, _, column_sums, _, _, activation, compute, threshold, keep, backend = inputs
        keep = keep or ctx.needs_input_grad[0]
        output = registration.below_autograd(
            torch.ops.limber_fast.int8_linear_fwd.default, *inputs[:8], compute, threshold, keep, backend
        )
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(packed, scales, column_sums, None if activation is None else output[1])
        ctx.backend = backend
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        d_x = None
        if grad is not None and ctx.needs_input_grad[0]:
            d_x = registration.run_backward(
                torch.ops.limber_fast.int8_linear_bwd.default, grad, *ctx.saved_tensors, ctx.backend
            )
        return d_x, *(None,) * 5, grad if ctx.needs_input_grad[6] else None, *(None,) * 5


_NO_VMAP = "int8_linear: torch.vmap is not supported; x has batch dimensions of its own: use those"
registration.define(
    "int8_linear_fwd(Tensor x, Tensor packed, Tensor scales, Tensor row_sums, Tensor column_sums, Tensor? bias, "
    "Tensor? residual, str? activation, str compute, float outlier_threshold, bool keep, str backend) "
    "-> (Tensor out, Tensor preactivation)",
    _forward, _forward_fake, _NO_VMAP,
)  # fmt: skip
registration.define(
    "int8_linear_bwd(Tensor grad, Tensor packed, Tensor scales, Tensor column_sums, Tensor? preactivation, "
    "str backend) -> Tensor",
    _backward, _backward_fake, _NO_VMAP,
)  # fmt: skip

_FORWARD, _BACKWARD = torch.ops.limber_fast.int8_linear_fwd.default, torch.ops.limber_fast.int8_linear_bwd.default
registration.differentiate(_FORWARD, _Int8Linear, "int8_linear", _EAGER)
registration.differentiate(
    _BACKWARD, registration.not_differentiable(_BACKWARD, "int8_linear", _EAGER), "int8_linear", _EAGER
)
