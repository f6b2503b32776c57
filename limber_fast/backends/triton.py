"""The Triton backend (CUDA tensors): kernels/<stem>.py, compiled on first use for the device at hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from limber_fast.ops.info_nce import InfoNceState

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST, _NEWEST = (8, 0), (9, 9)
# Two programs a multiprocessor: while one waits at its epilogue the other keeps the tensor cores busy.
_PROGRAMS_PER_SM = 2


def info_nce_supports(request: Any) -> str | None:
    if request.dtype not in _DTYPES:
        return f"computes in float32, bfloat16 and float16; got {str(request.dtype).removeprefix('torch.')}"
    if not torch.cuda.is_available():
        return "no CUDA device"
    capability = torch.cuda.get_device_capability(request.device)
    if capability < _OLDEST:
        return f"needs compute capability 8.0 or newer; this device has {capability[0]}.{capability[1]}"
    if capability > _NEWEST:
        return f"has no tiles for compute capability {capability[0]}.{capability[1]} yet: those of 9.0 spill there"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton does not import ({error}); install torch's own version of it"
    return None


def _chip(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability, and how many programs a persistent kernel starts."""
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), _PROGRAMS_PER_SM * properties.multi_processor_count


def _precision() -> str:
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Where Triton puts the TMA descriptors that programs make."""
    return torch.empty(size, dtype=torch.uint8, device="cuda")


def _call(
    image: Tensor, text: Tensor, extra: Tensor | None, logit_scale: Tensor, logit_bias: Tensor | None,
    labels: Tensor | None, image_ids: Tensor | None, text_ids: Tensor | None, label_smoothing: float, normalize: bool,
    variant: str, columns: bool,
) -> Any:  # fmt: skip
    import triton

    from limber_fast.kernels import info_nce_configs, info_nce_launch

    capability, programs = _chip(image.device)
    precision = _precision()
    aligned = info_nce_launch.tma_can_read(image, text, extra)
    config = info_nce_configs.choose(capability, image.dtype, precision, aligned)
    if config.tma:
        triton.set_allocator(_scratch)
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


def project_concat_supports(request: Any) -> str:
    return "no project_concat kernel in this release"
