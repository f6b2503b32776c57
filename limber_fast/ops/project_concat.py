"""project_concat: soft prompts projected straight into their rows of the embedded sequence, text gathered beside."""

from __future__ import annotations

import torch
from torch import Tensor

from limber_fast import checks, dispatch
from limber_fast.ops import registration
from limber_fast.ops.project_concat_op import ProjectConcatRequest, dropout_threshold

__all__ = ["ProjectConcatRequest", "dropout_threshold", "project_concat"]

_OP = "project_concat"
LayerNorm = torch.nn.LayerNorm | tuple[Tensor | None, Tensor | None, float]


def typical_request(device: torch.device) -> ProjectConcatRequest:
    """The call that `limber-fast env` asks the backends about."""
    return ProjectConcatRequest(device, torch.bfloat16, 8 * 144, 3072, 4096, torch.float16, 0.1, False)


def project_concat(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_ids: Tensor,
    embedding: Tensor | tuple[Tensor, Tensor],
    *,
    image_token_id: int,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    layer_norm: LayerNorm | None = None,
    backend: str = "auto",
) -> Tensor:
    """Input of a frozen language model: each image's k projected features in the places of its image tokens.

    With the image tokens of `input_ids` in reading order (row by row), and soft prompt r of image ``r // k``::

        p_r = layer_norm(dropout(weight features[r // k, r % k] + bias))
        inputs_embeds[b, s] = p_r                       where input_ids[b, s] is the r-th image token
                            = embedding[input_ids[b, s]]  elsewhere

    The soft prompts are written where they belong: there is no [n_images k, E] tensor and no concatenation (own
    kernels; a layer_norm's gradient on a GPU takes one).

    Args:
        features: [n_images, k, D] fp16|bf16|fp32 (fp64 runs on the eager backend), of a frozen or a tuned encoder. Any
            strides, such as a class token sliced off; a tensor that is not contiguous in D is copied. n_images may be
            0, for prompts without images.
        weight: [E, D], the dtype and device of `features`, as nn.Linear(D, E).weight.
        bias: [E], the dtype of `features`, or None.
        input_ids: [B, S] integers. A run of image tokens is one image or several neighbours, k tokens each, so a row
            holds any number of images, in any places (few-shot prompts), or none. Checking waits for the device.
        embedding: [V, E] fp16|bf16|fp32, rows converted to the dtype of `features`; or a pair (int8 [V, E], fp32 scales
            [V]) whose row v is scales[v] times the integers. Frozen: it never gets a gradient.
        image_token_id: marks the places of the soft prompts; may lie outside [0, V), where every other id lies.
        dropout_p: share in [0, 1) of the projection's outputs that become 0, the others growing by 1 / (1 - p). For a
            model that does not train, pass 0.
        seed: of the dropout mask, in [0, 2^63); by default drawn from torch's default generator. One seed gives one
            mask on every backend and device (`limber_fast.reference.project_concat.random_words` defines it).
        layer_norm: torch.nn.LayerNorm(E), or (weight [E] or None, bias [E] or None, eps): applied to the soft prompts
            after dropout, as MAGMA does.
        backend: 'auto', 'cpu', 'cuda', 'triton' or 'eager'; see `limber_fast.use_backend`.

    Returns:
        inputs_embeds [B, S, E] in the dtype of `features`. Gradients reach features, weight, bias and layer_norm's
        weight and bias, whichever require them; frozen ones cost nothing. Sums are in fp32. NaN and Inf propagate as in
        eager PyTorch. Results do not depend on the number of threads (own kernels).

    Under torch.autocast features, weight and bias are cast as for nn.Linear, and so is the result.

    Saved for backward: the arguments but the embedding, the places of the image tokens, and the seed; the mask, and
    under layer_norm the projection, are computed again.

    Raises:
        ValueError: a shape or value breaks the contract above, such as a run of image tokens that is no multiple of k,
            or fewer or more runs than images; an embedding that requires grad. TypeError: a dtype or kind does.
        BackendUnavailable: the named backend cannot run this call.
        RuntimeError: a second derivative, forward-mode differentiation, torch.vmap or a torch.func transform.

    Source: Merullo et al., arXiv 2209.15162, section 3; Eichenberg et al., arXiv 2112.05253, section 3 (layer_norm).
    """
    checks.choice(_OP, "backend", backend, dispatch.CHOICES)
    checks.image_features(_OP, features)
    checks.has_data(_OP, "features", features)
    checks.dense(_OP, "weight", weight, "[E, D]")
    features, weight, bias = registration.autocast(features, weight, bias)
    checks.projection(_OP, weight, features)
    if bias is not None:
        checks.vector(_OP, "bias", bias, weight.shape[0], "E", "features", features)
        checks.same_dtype(_OP, "bias", bias, "features", features)
        bias = bias.contiguous()
    checks.token_ids(_OP, input_ids, features)
    checks.token_id(_OP, "image_token_id", image_token_id)
    checks.word_embedding(_OP, embedding, weight)
    checks.dropout(_OP, dropout_p, seed)
    table, scales = embedding if isinstance(embedding, (tuple, list)) else (embedding, None)
    ln_weight, ln_bias, ln_eps = _layer_norm(layer_norm, weight)
    inputs_embeds, _ = registration.call(
        torch.ops.limber_fast.project_concat_fwd.default,
        _unit_stride(features), _unit_stride(weight), bias, ln_weight, ln_bias, input_ids, _unit_stride(table),
        None if scales is None else scales.to(torch.float32).contiguous(), _seed(seed) if dropout_p else None,
        int(image_token_id), float(dropout_p), ln_eps, dispatch.preferred(backend),
    )  # fmt: skip
    return inputs_embeds


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _seed(seed: int | Tensor | None) -> Tensor:
    """On the CPU for every device: the launch needs its value, and a CUDA generator would make it wait."""
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")
    if isinstance(seed, Tensor):
        return seed.reshape(()).to("cpu", torch.int64)
    return torch.full((), seed, dtype=torch.int64, device="cpu")


def _layer_norm(found: LayerNorm | None, weight: Tensor) -> tuple[Tensor | None, Tensor | None, float | None]:
    """Weight and bias in the dtype that the norm is computed in."""
    if found is None:
        return None, None, None
    if isinstance(found, torch.nn.LayerNorm):
        checks.normalized_shape(_OP, found.normalized_shape, weight)
        found = (found.weight, found.bias, found.eps)
    checks.layer_norm(_OP, found, weight)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    ln_weight, ln_bias = (None if x is None else x.to(dtype).contiguous() for x in found[:2])
    return ln_weight, ln_bias, float(found[2])
