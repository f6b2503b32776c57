"""info_nce: tensors to the launchers of kernels/info_nce_launch.py and info_nce_bwd_launch.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from limber_fast.backends.triton import device, tuning
from limber_fast.ops.info_nce import InfoNceState


def info_nce_supports(request: Any) -> str | None:
    return device.refusal(request.device, request.dtype)


def _call(
    image: Tensor, text: Tensor, extra: Tensor | None, logit_scale: Tensor, logit_bias: Tensor | None,
    labels: Tensor | None, image_ids: Tensor | None, text_ids: Tensor | None, label_smoothing: float, normalize: bool,
    variant: str, columns: bool, cache: Tensor,
) -> Any:  # fmt: skip
    from limber_fast.kernels import info_nce_configs, info_nce_launch

    capability, programs = device.chip(image.device)
    precision = device.precision()
    aligned = info_nce_launch.tma_can_read(image, text, extra)
    config = info_nce_configs.choose(capability, image.dtype, precision, aligned)
    device.prepare(config.tma)
    rows = sum(-(-len(x) // 4) * 4 for x in (image, text, extra) if x is not None)
    fits = normalize and cache.numel() >= 4 * rows and cache.data_ptr() % 16 == 0
    kept = cache[: 4 * rows].view(torch.float32) if fits else None
    call = info_nce_launch.Call(
        image=image, text=text, extra=extra, scale=logit_scale,
        bias=torch.zeros_like(logit_scale) if logit_bias is None else logit_bias, labels=labels, image_ids=image_ids,
        text_ids=text_ids, label_smoothing=label_smoothing, normalize=normalize, sigmoid=variant == "sigmoid",
        columns=columns, config=config, programs=programs,
        sms=max(1, programs // device.PROGRAMS_PER_SM), precision=precision, kept=kept,
    )  # fmt: skip
    return _tuned(call) if tuning.asked() and device.may_time(image.device) else call


def _tuned(call: Any) -> Any:
    """The call with as many programs a multiprocessor as were fastest here; the table's is one of the candidates.

    The number of programs changes no build and no bit of a result.
    """
    from limber_fast.kernels import info_nce_bwd_launch, info_nce_launch

    table = call.programs

    def with_programs(name: str) -> Any:
        return replace(call, programs=max(1, int(table * float(name))))

    def measure(name: str) -> float:
        from triton.testing import do_bench

        timed = replace(with_programs(name), kept=None)

        def step() -> None:
            row, col, _, _ = info_nce_launch.info_nce_fwd(timed, False)
            info_nce_bwd_launch.info_nce_bwd(timed, row, col, gradient, gradient_of_columns, need_image=True,
                                             need_text=True, need_extra=call.extra is not None)  # fmt: skip

        return do_bench(step)

    sizes = [1 << (len(x) - 1).bit_length() for x in (call.image, call.text)]
    gradient = torch.full((len(call.image),), 1 / len(call.image), device=call.image.device)
    gradient_of_columns = torch.full((len(call.text),), 1 / len(call.text), device=call.image.device)
    gradient_of_columns = gradient_of_columns if call.columns else None
    options = (call.sigmoid, call.normalize, call.columns)
    problem = (call.image.dtype, call.precision, *sizes, call.image.shape[1], *options)
    key = f"info_nce {device.versions(call.image.device)}: {', '.join(map(str, problem))}"
    return with_programs(tuning.choose(key, ("1.0", "0.5", "2.0"), measure))


@device.guarded
def info_nce_fwd(
    image: Tensor, text: Tensor, extra_negatives: Tensor | None, logit_scale: Tensor, logit_bias: Tensor | None,
    labels: Tensor | None, image_ids: Tensor | None, text_ids: Tensor | None, *, label_smoothing: float,
    normalize: bool, variant: str, symmetric: bool, with_stats: bool, cache_bytes: int,
) -> InfoNceState:  # fmt: skip
    from limber_fast.kernels import info_nce_launch

    # Norms are all that is kept from the forward; without any the shape that was promised, on one byte.
    cache = torch.empty(cache_bytes if normalize else 1, dtype=torch.uint8, device=image.device)
    call = _call(image, text, extra_negatives, logit_scale, logit_bias, labels, image_ids, text_ids, label_smoothing,
                 normalize, variant, symmetric and variant == "softmax", cache)  # fmt: skip
    row, col, row_correct, col_correct = info_nce_launch.info_nce_fwd(call, with_stats)
    return InfoNceState(row, col, row_correct, col_correct, cache if normalize else cache.expand(cache_bytes))


@device.guarded
def info_nce_bwd(
    image: Tensor, text: Tensor, extra_negatives: Tensor | None, logit_scale: Tensor, logit_bias: Tensor | None,
    labels: Tensor | None, image_ids: Tensor | None, text_ids: Tensor | None, row_grad: Tensor,
    col_grad: Tensor | None, state: InfoNceState, *, label_smoothing: float, normalize: bool, variant: str,
    symmetric: bool, need_image: bool, need_text: bool, need_extra: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    from limber_fast.kernels import info_nce_bwd_launch

    call = _call(image, text, extra_negatives, logit_scale, logit_bias, labels, image_ids, text_ids, label_smoothing,
                 normalize, variant, col_grad is not None, state.cache)  # fmt: skip
    return info_nce_bwd_launch.info_nce_bwd(
        call, state.row, state.col, row_grad, col_grad, need_image=need_image, need_text=need_text,
        need_extra=need_extra,
    )
