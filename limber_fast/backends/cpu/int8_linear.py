"""int8_linear: tensors to the parameters of csrc/params/int8_linear.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from limber_fast import native
from limber_fast.backends.cpu.tensors import DTYPES, address, threads, unknown_dtype

MOST_REDUCED = 1 << 16  # 65536 * 255 * 127 < 2^31


def int8_linear_supports(request: Any) -> str | None:
    if reason := unknown_dtype(request.dtype):
        return reason
    if request.K > MOST_REDUCED:
        return f"sums at most {MOST_REDUCED} products exactly; got {request.K}"
    native.cpu()
    return None


def _params(kernels: Any, m: int, n: int, k: int, dtype: torch.dtype, packed: Tensor, scales: Tensor) -> Any:
    return kernels.Int8LinearParams(
        M=m, N=n, K=k, dtype=DTYPES[dtype], packed=packed.data_ptr(), scales=scales.data_ptr(), threads=threads()
    )


def int8_linear_fwd(
    x: Tensor, packed: Tensor, scales: Tensor, row_sums: Tensor, bias: Tensor | None, residual: Tensor | None, *,
    activation: str | None, compute: str, outlier_threshold: float, keep: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    (m, k), n = x.shape, scales.shape[0]  # len() of a tensor takes a microsecond
    out = torch.empty(m, n, dtype=x.dtype)
    preactivation = torch.empty(m, n, dtype=x.dtype) if keep else None
    kernels = native.cpu()
    kernels.int8_linear_fwd(
        _params(kernels, m, n, k, x.dtype, packed, scales), address(x), x.stride(0), row_sums.data_ptr(),
        address(bias), address(residual), 0 if residual is None else residual.stride(0), activation == "gelu_new",
        compute == "w8a8", outlier_threshold, address(out), address(preactivation),
    )  # fmt: skip
    return out, preactivation


def int8_linear_bwd(
    grad: Tensor, packed: Tensor, scales: Tensor, column_sums: Tensor, preactivation: Tensor | None
) -> Tensor:
    m, k = len(grad), len(column_sums)
    d_x = torch.empty(m, k, dtype=grad.dtype)
    kernels = native.cpu()
    kernels.int8_linear_bwd(
        _params(kernels, m, len(scales), k, grad.dtype, packed, scales), address(grad), grad.stride(0),
        column_sums.data_ptr(), address(preactivation), address(d_x),
    )  # fmt: skip
    return d_x
