"""project_concat: tensors to the parameters of csrc/params/project_concat.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from limber_fast import native
from limber_fast.backends.cpu.tensors import DTYPES, address, threads, unknown_dtype
from limber_fast.ops.project_concat import dropout_threshold


def project_concat_supports(request: Any) -> str | None:
    if reason := unknown_dtype(request.dtype):
        return reason
    if request.embedding_dtype == torch.float64:
        return "gathers embeddings of float32, bfloat16, float16 and int8; got float64"
    native.cpu()
    return None


def _params(
    kernels: Any, features: Tensor, weight: Tensor, bias: Tensor | None, ln_weight: Tensor | None,
    ln_bias: Tensor | None, positions: Tensor, seed: int, dropout_p: float, ln_eps: float | None,
) -> Any:  # fmt: skip
    n_images, k, d = features.shape
    return kernels.ProjectConcatParams(
        features=address(features), weight=address(weight), bias=address(bias), ln_weight=address(ln_weight),
        ln_bias=address(ln_bias), positions=address(positions), n_images=n_images, k=k, D=d, E=weight.shape[0],
        image_stride=features.stride(0), row_stride=features.stride(1), weight_stride=weight.stride(0),
        dtype=DTYPES[features.dtype], dropout=dropout_p > 0, threshold=dropout_threshold(dropout_p),
        factor=1 / (1 - dropout_p), seed=seed, layer_norm=ln_eps is not None, ln_eps=ln_eps or 0.0, threads=threads(),
    )  # fmt: skip


def project_concat_fwd(
    features: Tensor, weight: Tensor, bias: Tensor | None, ln_weight: Tensor | None, ln_bias: Tensor | None,
    input_ids: Tensor, embedding: Tensor, embedding_scales: Tensor | None, positions: Tensor, *, image_token_id: int,
    seed: int, dropout_p: float, ln_eps: float | None,
) -> Tensor:  # fmt: skip
    inputs_embeds = torch.empty(*input_ids.shape, weight.shape[0], dtype=features.dtype)
    kernels = native.cpu()
    params = _params(kernels, features, weight, bias, ln_weight, ln_bias, positions, seed, dropout_p, ln_eps)
    kernels.project_concat_fwd(
        params, address(input_ids), input_ids.numel(), image_token_id, address(embedding), embedding.stride(0),
        "int8" if embedding_scales is not None else DTYPES[embedding.dtype], address(embedding_scales),
        address(inputs_embeds),
    )  # fmt: skip
    return inputs_embeds


def project_concat_bwd(
    grad: Tensor, features: Tensor, weight: Tensor, bias: Tensor | None, ln_weight: Tensor | None, positions: Tensor, *,
    seed: int, dropout_p: float, ln_eps: float | None, needs: list[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    def gradient(need: bool, *shape: int, dtype: torch.dtype = features.dtype) -> Tensor | None:
        return torch.empty(shape, dtype=dtype) if need else None

    outputs = (
        gradient(needs[0], *features.shape), gradient(needs[1], *weight.shape), gradient(needs[2], weight.shape[0]),
        *(gradient(need, weight.shape[0], dtype=torch.float32) for need in needs[3:]),
    )  # fmt: skip
    kernels = native.cpu()
    params = _params(kernels, features, weight, bias, ln_weight, None, positions, seed, dropout_p, ln_eps)
    kernels.project_concat_bwd(params, address(grad), grad.shape[1], *grad.stride()[:2], *map(address, outputs))
    return outputs
