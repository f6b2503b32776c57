"""info_nce: tensors to the launchers of kernels/info_nce_launch.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from limber_fast.backends.triton import device
from limber_fast.ops.info_nce import InfoNceState


def info_nce_supports(request: Any) -> str | None:
    return device.refusal(request.device, request.dtype)


def _call(
    image: Tensor, text: Tensor, extra: Tensor | None, logit_scale: Tensor, logit_bias: Tensor | None,
    labels: Tensor | None, image_ids: Tensor | None, text_ids: Tensor | None, label_smoothing: float, normalize: bool,
    variant: str, columns: bool,
) -> Any:  # fmt: skip
    from limber_fast.kernels import info_nce_configs, info_nce_launch

    capability, programs = device.chip(image.device)
    precision = device.precision()
    aligned = info_nce_launch.tma_can_read(image, text, extra)
    config = info_nce_configs.choose(capability, image.dtype, precision, aligned)
    device.prepare(config.tma)
    return info_nce_launch.Call(
        image=image, text=text, extra=extra, scale=logit_scale,
        bias=torch.zeros_like(logit_scale) if logit_bias is None else logit_bias, labels=labels, image_ids=image_ids,
        text_ids=text_ids, label_smoothing=label_smoothing, normalize=normalize, sigmoid=variant == "sigmoid",
        columns=columns, config=config, programs=programs, precision=precision,
    )  # fmt: skip


def info_nce_fwd(
    image: Tensor, text: Tensor, extra_negatives: Tensor | None, logit_scale: Tensor, logit_bias: Tensor | None,
    labels: Tensor | None, image_ids: Tensor | None, text_ids: Tensor | None, *, label_smoothing: float,
    normalize: bool, variant: str, symmetric: bool, with_stats: bool, cache_bytes: int,
) -> InfoNceState:  # fmt: skip
    from limber_fast.kernels import info_nce_launch

    call = _call(image, text, extra_negatives, logit_scale, logit_bias, labels, image_ids, text_ids, label_smoothing,
                 normalize, variant, symmetric and variant == "softmax")  # fmt: skip
    row, col, row_correct, col_correct = info_nce_launch.info_nce_fwd(call, with_stats)
    # Nothing is kept from the forward: the shape that was promised, on one byte.
    return InfoNceState(row, col, row_correct, col_correct, image.new_empty(1, dtype=torch.uint8).expand(cache_bytes))


def info_nce_bwd(
    image: Tensor, text: Tensor, extra_negatives: Tensor | None, logit_scale: Tensor, logit_bias: Tensor | None,
    labels: Tensor | None, image_ids: Tensor | None, text_ids: Tensor | None, row_grad: Tensor,
    col_grad: Tensor | None, state: InfoNceState, *, label_smoothing: float, normalize: bool, variant: str,
    symmetric: bool, need_image: bool, need_text: bool, need_extra: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    from limber_fast.kernels import info_nce_launch

    call = _call(image, text, extra_negatives, logit_scale, logit_bias, labels, image_ids, text_ids, label_smoothing,
                 normalize, variant, col_grad is not None)  # fmt: skip
    return info_nce_launch.info_nce_bwd(
        call, state.row, state.col, row_grad, col_grad, need_image=need_image, need_text=need_text,
        need_extra=need_extra,
    )
