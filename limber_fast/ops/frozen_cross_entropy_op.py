"""`torch.ops.limber_fast.frozen_cross_entropy_*`: schemas, fake kernels, autograd and vmap of the op.

The public function, with its documentation and argument checks, is
`limber_fast.ops.frozen_cross_entropy.frozen_cross_entropy`. The forward op also writes the gradient of each row's loss,
[M, D] with zeros where there is no label: of a shape known beforehand, so that torch.compile need not break its graph.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from limber_fast import checks, dispatch
from limber_fast.ops import registration

_EAGER = "the plain formula, limber_fast.reference.frozen_cross_entropy, has every derivative"


class FrozenCrossEntropyRequest(NamedTuple):
    """What a backend is told when it is asked whether it can run a call."""

    device: torch.device
    dtype: torch.dtype
    M: int
    D: int
    V: int


def _backend(backend: str, rows: Tensor, vocabulary: int) -> Any:
    request = FrozenCrossEntropyRequest(rows.device, rows.dtype, *rows.shape, vocabulary)
    return dispatch.select("frozen_cross_entropy", request, backend)


def _forward(
    hidden: Tensor, packed: Tensor, scales: Tensor, row_sums: Tensor, column_sums: Tensor, bias: Tensor | None,
    labels: Tensor, ignore_index: int, keep: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    checks.vocabulary_labels("frozen_cross_entropy", labels, ignore_index, len(scales))
    losses, gradient = _backend(backend, hidden, len(scales)).frozen_cross_entropy_fwd(
        hidden, packed, scales, row_sums, column_sums, bias, labels, ignore_index=ignore_index, keep=keep
    )
    return losses, hidden.new_empty(0, 0) if gradient is None else gradient


def _forward_fake(hidden, packed, scales, row_sums, column_sums, bias, labels, ignore_index, keep, backend):
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return hidden.new_empty(hidden.shape[0], dtype=wide), hidden.new_empty(hidden.shape if keep else (0, 0))


def _backward(d_losses: Tensor, gradient: Tensor, labels: Tensor, ignore_index: int, V: int, backend: str) -> Tensor:
    return _backend(backend, gradient, V).frozen_cross_entropy_bwd(
        d_losses.contiguous(), gradient, labels, ignore_index=ignore_index
    )


def _backward_fake(d_losses, gradient, labels, ignore_index, V, backend):
    return torch.empty_like(gradient)


class _FrozenCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        scales, labels, ignore_index, keep, backend = inputs[2], *inputs[6:]
        output = registration.below_autograd(
            torch.ops.limber_fast.frozen_cross_entropy_fwd.default, *inputs[:8],
            keep or ctx.needs_input_grad[0], backend,
        )  # fmt: skip
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(output[1], labels)
        ctx.options = ignore_index, scales.shape[0], backend
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, d_losses: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        d_hidden = None
        if d_losses is not None and ctx.needs_input_grad[0]:
            d_hidden = registration.run_backward(
                torch.ops.limber_fast.frozen_cross_entropy_bwd.default, d_losses, *ctx.saved_tensors, *ctx.options
            )
        return d_hidden, *(None,) * 9


_NO_VMAP = "frozen_cross_entropy: torch.vmap is not supported; hidden has batch dimensions of its own: use those"
registration.define(
    "frozen_cross_entropy_fwd(Tensor hidden, Tensor packed, Tensor scales, Tensor row_sums, Tensor column_sums, "
    "Tensor? bias, Tensor labels, int ignore_index, bool keep, str backend) -> (Tensor losses, Tensor gradient)",
    _forward, _forward_fake, _NO_VMAP,
)  # fmt: skip
registration.define(
    "frozen_cross_entropy_bwd(Tensor d_losses, Tensor gradient, Tensor labels, int ignore_index, SymInt V, "
    "str backend) -> Tensor",
    _backward, _backward_fake, _NO_VMAP,
)  # fmt: skip

_FORWARD = torch.ops.limber_fast.frozen_cross_entropy_fwd.default
_BACKWARD = torch.ops.limber_fast.frozen_cross_entropy_bwd.default
registration.differentiate(_FORWARD, _FrozenCrossEntropy, "frozen_cross_entropy", _EAGER)
registration.differentiate(
    _BACKWARD,
    registration.not_differentiable(_BACKWARD, "frozen_cross_entropy", _EAGER),
    "frozen_cross_entropy",
    _EAGER,
)
