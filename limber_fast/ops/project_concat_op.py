"""`torch.ops.limber_fast.project_concat_*`: schemas, fake kernels, autograd and vmap of the project_concat op.

The public function, with its documentation and argument checks, is `limber_fast.ops.project_concat.project_concat`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from limber_fast import checks, dispatch
from limber_fast.ops import registration

_EAGER = "the plain formula, limber_fast.reference.project_concat, has every derivative"


class ProjectConcatRequest(NamedTuple):
    """What a backend is told when it is asked whether it can run a call; rows = n_images k soft prompts."""

    device: torch.device
    dtype: torch.dtype
    rows: int
    D: int
    E: int
    embedding_dtype: torch.dtype | None  # None in the backward pass
    dropout_p: float
    layer_norm: bool


def dropout_threshold(dropout_p: float) -> int:
    """Words below it are dropped; see `limber_fast.reference.project_concat.random_words`."""
    return min(int(dropout_p * 2**32 + 0.5), 2**32 - 1)


def _backend(
    backend: str, features: Tensor, weight: Tensor, embedding: Tensor | None, dropout_p: float, eps: float | None
) -> Any:
    request = ProjectConcatRequest(
        features.device, features.dtype, features.shape[0] * features.shape[1], *reversed(weight.shape),
        None if embedding is None else embedding.dtype, dropout_p, eps is not None,
    )  # fmt: skip
    return dispatch.select("project_concat", request, backend)


def _positions(input_ids: Tensor, image_token_id: int, n_images: int, k: int, vocabulary: int) -> Tensor:
    """[n_images k] int64: the places of the image tokens in input_ids.reshape(-1), in reading order.

    Found on the host, whose one look at the ids also tells whether they keep the contract; in NumPy, because torch may
    take threads for it, which a forked child must not wait for.
    """
    ids = input_ids.numpy(force=True)
    is_image = ids == image_token_id
    positions = np.flatnonzero(is_image)
    images = positions.reshape(-1, k) if positions.size == n_images * k else None
    text = np.where(is_image, 0, ids)
    if (
        images is None
        or (text.size and not (text.min() >= 0 and text.max() < vocabulary))
        or (images[:, -1] - images[:, 0] != k - 1).any()  # k neighbours each, in one row: every run is whole images
        or (images[:, -1] // ids.shape[1] != images[:, 0] // ids.shape[1]).any()
    ):
        checks.image_tokens("project_concat", ids.tolist(), image_token_id, n_images, k, vocabulary)
    return torch.from_numpy(positions).to(input_ids.device)


def _forward(
    features: Tensor, weight: Tensor, bias: Tensor | None, ln_weight: Tensor | None, ln_bias: Tensor | None,
    input_ids: Tensor, embedding: Tensor, embedding_scales: Tensor | None, seed: Tensor | None, image_token_id: int,
    dropout_p: float, ln_eps: float | None, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    module = _backend(backend, features, weight, embedding, dropout_p, ln_eps)
    input_ids = input_ids.to(torch.int64).contiguous()
    positions = _positions(input_ids, image_token_id, features.shape[0], features.shape[1], embedding.shape[0])
    inputs_embeds = module.project_concat_fwd(
        features, weight, bias, ln_weight, ln_bias, input_ids, embedding, embedding_scales, positions,
        image_token_id=image_token_id, seed=0 if seed is None else int(seed), dropout_p=dropout_p, ln_eps=ln_eps,
    )  # fmt: skip
    return inputs_embeds, positions


def _forward_fake(
    features, weight, bias, ln_weight, ln_bias, input_ids, embedding, embedding_scales, seed, image_token_id,
    dropout_p, ln_eps, backend,
):  # fmt: skip
    inputs_embeds = features.new_empty(*input_ids.shape, weight.shape[0])
    return inputs_embeds, features.new_empty(features.shape[0] * features.shape[1], dtype=torch.int64)


def _backward(
    grad: Tensor, features: Tensor, weight: Tensor, bias: Tensor | None, ln_weight: Tensor | None,
    ln_bias: Tensor | None, positions: Tensor, seed: Tensor | None, dropout_p: float, ln_eps: float | None,
    backend: str, needs: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    gradients = _backend(backend, features, weight, None, dropout_p, ln_eps).project_concat_bwd(
        grad if grad.stride(-1) == 1 else grad.contiguous(), features, weight, bias, ln_weight, positions,
        seed=0 if seed is None else int(seed), dropout_p=dropout_p, ln_eps=ln_eps, needs=needs,
    )  # fmt: skip
    return tuple(features.new_empty(0) if g is None else g for g in gradients)


def _backward_fake(
    grad, features, weight, bias, ln_weight, ln_bias, positions, seed, dropout_p, ln_eps, backend, needs
):  # fmt: skip
    inputs = (features, weight, bias, ln_weight, ln_bias)
    return tuple(x.new_empty(x.shape) if need else features.new_empty(0) for x, need in zip(inputs, needs, strict=True))


class _ProjectConcat(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = registration.below_autograd(torch.ops.limber_fast.project_concat_fwd.default, *inputs)
        features, weight, bias, ln_weight, ln_bias, _, _, _, seed, _, dropout_p, ln_eps, backend = inputs
        ctx.save_for_backward(features, weight, bias, ln_weight, ln_bias, output[1], seed)
        ctx.options = dropout_p, ln_eps, backend
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:5])
        if grad is None or not any(needs):
            return (None,) * 13
        gradients = registration.run_backward(
            torch.ops.limber_fast.project_concat_bwd.default, grad, *ctx.saved_tensors, *ctx.options, needs
        )
        return *(g if need else None for g, need in zip(gradients, needs, strict=True)), *(None,) * 8


_PROJECTION = "Tensor features, Tensor weight, Tensor? bias, Tensor? ln_weight, Tensor? ln_bias"
_NO_VMAP = "project_concat: torch.vmap is not supported; input_ids has a batch dimension of its own: use that"
registration.define(
    f"project_concat_fwd({_PROJECTION}, Tensor input_ids, Tensor embedding, Tensor? embedding_scales, Tensor? seed, "
    "SymInt image_token_id, float dropout_p, float? ln_eps, str backend) -> (Tensor inputs_embeds, Tensor positions)",
    _forward, _forward_fake, _NO_VMAP,
)  # fmt: skip
registration.define(
    f"project_concat_bwd(Tensor grad, {_PROJECTION}, Tensor positions, Tensor? seed, float dropout_p, float? ln_eps, "
    "str backend, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward, _backward_fake, _NO_VMAP,
)  # fmt: skip

_FORWARD, _BACKWARD = torch.ops.limber_fast.project_concat_fwd.default, torch.ops.limber_fast.project_concat_bwd.default
registration.differentiate(_FORWARD, _ProjectConcat, "project_concat", _EAGER)
registration.differentiate(
    _BACKWARD, registration.not_differentiable(_BACKWARD, "project_concat", _EAGER), "project_concat", _EAGER
)
