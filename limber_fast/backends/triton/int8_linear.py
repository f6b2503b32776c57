"""int8_linear: tensors to the launchers of kernels/int8_linear_launch.py."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from limber_fast.backends.triton import device

MOST_REDUCED = 1 << 16  # 65536 * 255 * 127 < 2^31


def int8_linear_supports(request: Any) -> str | None:
    if request.compute == "w8a8" and request.K > MOST_REDUCED:
        return f"sums at most {MOST_REDUCED} products of 8 bits exactly; got {request.K}"
    return device.refusal(request.device, request.dtype)


def weight_on_device(rows: Tensor, scales: Tensor, row_sums: Tensor, k: int) -> Any:
    from limber_fast.kernels import int8_linear_launch as launch

    capability, programs = device.chip(rows.device)
    device.prepare(capability[0] >= 9)
    return launch.Weight(rows, scales, row_sums, k, capability, programs)


@device.guarded
def int8_linear_fwd(
    x: Tensor, packed: Tensor, scales: Tensor, row_sums: Tensor, bias: Tensor | None, residual: Tensor | None, *,
    activation: str | None, compute: str, outlier_threshold: float, keep: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    from limber_fast.kernels import int8_linear_launch as launch

    out = x.new_empty(len(x), len(scales))
    kept = x.new_empty(out.shape) if keep else None
    if len(x):
        launch.int8_linear_fwd(
            x, weight_on_device(packed, scales, row_sums, x.shape[1]), bias, residual, out, kept,
            gelu=activation == "gelu_new", w8a8=compute == "w8a8", threshold=outlier_threshold,
        )  # fmt: skip
    return out, kept


@device.guarded
def int8_linear_bwd(
    grad: Tensor, packed: Tensor, scales: Tensor, column_sums: Tensor, preactivation: Tensor | None
) -> Tensor:
    from limber_fast.kernels import int8_linear_launch as launch

    d_x = grad.new_empty(len(grad), len(column_sums))
    if len(grad):
        weight = weight_on_device(packed, scales, column_sums, len(column_sums))
        g, factor = launch.fold_scales(grad, preactivation, weight)
        launch.int8_linear_bwd(g, factor, weight, d_x)
    return d_x
