"""project_concat: tensors to the launchers of kernels/project_concat_launch.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from limber_fast.backends.triton import device
from limber_fast.ops.project_concat import dropout_threshold


def project_concat_supports(request: Any) -> str | None:
    if request.embedding_dtype == torch.float64:
        return "gathers embeddings of float32, bfloat16, float16 and int8; got float64"
    return device.refusal(request.device, request.dtype)


def _projection(features: Tensor, weight: Tensor, bias: Tensor | None, seed: int, dropout_p: float) -> Any:
    from limber_fast.kernels import project_concat_launch as launch
    from limber_fast.kernels.info_nce_launch import tma_can_read

    flat = features.reshape(-1, features.shape[2])  # a view unless images are slices of something larger
    capability, _ = device.chip(features.device)
    precision = device.precision()
    config = launch.choose(capability, features.dtype, precision, tma_can_read(flat, weight))
    device.prepare(config.tma)
    return launch.Projection(
        features=flat, weight=weight, bias=bias, seed=seed, threshold=dropout_threshold(dropout_p) if dropout_p else 0,
        factor=1 / (1 - dropout_p), config=config, precision=precision,
    )  # fmt: skip


@device.guarded
def project_concat_fwd(
    features: Tensor, weight: Tensor, bias: Tensor | None, ln_weight: Tensor | None, ln_bias: Tensor | None,
    input_ids: Tensor, embedding: Tensor, embedding_scales: Tensor | None, positions: Tensor, *, image_token_id: int,
    seed: int, dropout_p: float, ln_eps: float | None,
) -> Tensor:  # fmt: skip
    from limber_fast.kernels import project_concat_launch as launch

    p = _projection(features, weight, bias, seed, dropout_p)
    inputs_embeds = p.new(*input_ids.shape, weight.shape[0])
    rows = inputs_embeds.view(-1, weight.shape[0])
    launch.project(p, rows, positions, input_ids=input_ids, image_token_id=image_token_id, embedding=embedding,
                   scales=embedding_scales)  # fmt: skip
    if ln_eps is not None and positions.numel():
        launch.normalise(rows, positions, ln_weight, ln_bias, ln_eps)
    return inputs_embeds


@device.guarded
def project_concat_bwd(
    grad: Tensor, features: Tensor, weight: Tensor, bias: Tensor | None, ln_weight: Tensor | None, positions: Tensor, *,
    seed: int, dropout_p: float, ln_eps: float | None, needs: list[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    from limber_fast.kernels import project_concat_launch as launch

    p = _projection(features, weight, bias, seed, dropout_p)
    length = grad.shape[1]
    places = positions // length * grad.stride(0) + positions % length * grad.stride(1)
    d_ln_weight = d_ln_bias = None
    dropped = ln_eps is None
    if ln_eps is not None:
        _, programs = device.chip(features.device)
        grad, d_ln_weight, d_ln_bias = launch.through_norm(p, grad, places, ln_weight, ln_eps, programs, any(needs[3:]))
        places = torch.arange(grad.shape[0], device=grad.device) * grad.stride(0)
    d_features, d_weight, d_bias = launch.gradients(
        p, grad, places, dropped, need_features=needs[0], need_weight=needs[1], need_bias=needs[2]
    )
    return (
        None if d_features is None else d_features.view(features.shape), d_weight, d_bias,
        d_ln_weight if needs[3] else None, d_ln_bias if needs[4] else None,
    )  # fmt: skip
