"""info_nce: tensors to the parameters of csrc/params/info_nce.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from limber_fast import native
from limber_fast.backends.cpu.tensors import DTYPES, address, threads, unknown_dtype
from limber_fast.ops.info_nce import InfoNceState, state_fields

# From here on fresh pages cost more than the detour over a block of native memory that the next call reuses.
_REUSED_BYTES = 4 << 20


def _cache(size: int) -> Tensor:
    if size < _REUSED_BYTES:
        return torch.empty(size, dtype=torch.uint8)
    return torch.frombuffer(native.cpu().Scratch(size), dtype=torch.uint8)


def info_nce_supports(request: Any) -> str | None:
    if reason := unknown_dtype(request.dtype):
        return reason
    native.cpu()
    return None


def _params(
    image: Tensor, text: Tensor, extra: Tensor | None, logit_scale: Tensor, logit_bias: Tensor | None,
    labels: Tensor | None, image_ids: Tensor | None, text_ids: Tensor | None, row: Tensor, col: Tensor, cache: Tensor,
    label_smoothing: float, normalize: bool, variant: str, columns: bool, kernels: Any,
) -> Any:  # fmt: skip
    (n, d), m = image.shape, text.shape[0]
    sigmoid = variant == "sigmoid"
    return kernels.InfoNceParams(
        image=image.data_ptr(), text=text.data_ptr(), extra=address(extra),
        N=n, M=m, K=0 if extra is None else extra.shape[0], D=d,
        image_stride=image.stride(0), text_stride=text.stride(0), extra_stride=0 if extra is None else extra.stride(0),
        dtype=DTYPES[image.dtype], scale=logit_scale.item(),
        # The softmax does not see the bias: callers add it to the log-sum-exps.
        bias=logit_bias.item() if sigmoid and logit_bias is not None else 0.0, label_smoothing=label_smoothing,
        normalize=normalize, sigmoid=sigmoid, columns=columns, threads=threads(),
        labels=address(labels), image_ids=address(image_ids), text_ids=address(text_ids),
        row_state=row.data_ptr(), col_state=address(col), cache=address(cache), cache_bytes=cache.numel(),
    )  # fmt: skip


def info_nce_fwd(
    image: Tensor, text: Tensor, extra_negatives: Tensor | None, logit_scale: Tensor, logit_bias: Tensor | None,
    labels: Tensor | None, image_ids: Tensor | None, text_ids: Tensor | None, *, label_smoothing: float,
    normalize: bool, variant: str, symmetric: bool, with_stats: bool, cache_bytes: int,
) -> InfoNceState:  # fmt: skip
    n, m = image.shape[0], text.shape[0]
    columns = symmetric and variant == "softmax"
    # The kernels write fp32 whatever torch's default dtype is.
    fields = state_fields(label_smoothing)
    row = torch.empty(fields, n, dtype=torch.float32)
    col = (torch.empty if columns else torch.zeros)(fields, m, dtype=torch.float32)
    row_correct, col_correct = (torch.zeros(size, dtype=torch.uint8) for size in ((n, m) if with_stats else (0, 0)))
    cache = _cache(cache_bytes)
    params = _params(image, text, extra_negatives, logit_scale, logit_bias, labels, image_ids, text_ids, row, col,
                     cache, label_smoothing, normalize, variant, columns, kernels := native.cpu())  # fmt: skip
    kernels.info_nce_fwd(params, address(row_correct), address(col_correct) if columns else 0)
    return InfoNceState(row, col, row_correct, col_correct, cache)


def info_nce_bwd(
    image: Tensor, text: Tensor, extra_negatives: Tensor | None, logit_scale: Tensor, logit_bias: Tensor | None,
    labels: Tensor | None, image_ids: Tensor | None, text_ids: Tensor | None, row_grad: Tensor,
    col_grad: Tensor | None, state: InfoNceState, *, label_smoothing: float, normalize: bool, variant: str,
    symmetric: bool, need_image: bool, need_text: bool, need_extra: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    def gradient(x: Tensor | None, need: bool) -> Tensor | None:
        return torch.empty(x.shape, dtype=x.dtype) if need else None

    d_image, d_text = gradient(image, need_image), gradient(text, need_text)
    d_extra = gradient(extra_negatives, need_extra)
    params = _params(image, text, extra_negatives, logit_scale, logit_bias, labels, image_ids, text_ids, state.row,
                     state.col, state.cache, label_smoothing, normalize, variant, col_grad is not None,
                     kernels := native.cpu())  # fmt: skip
    row_grad, col_grad = row_grad.float(), None if col_grad is None else col_grad.float()
    kernels.info_nce_bwd(params, row_grad.data_ptr(), address(col_grad), address(d_image), address(d_text),
                              address(d_extra))  # fmt: skip
    return d_image, d_text, d_extra


def info_nce_total(row: Tensor, col: Tensor | None, field: int) -> float:
    """Sum of one field of the state over all rows, and over all columns unless `col` is None, in fp64."""
    n, m = row.shape[1], 0 if col is None else col.shape[1]
    at = [0 if x is None else x.data_ptr() + field * x.shape[1] * x.element_size() for x in (row, col)]
    return native.cpu().info_nce_total(at[0], n, at[1], m)
