"""InfoNCE: the loss of CLIP (softmax) and SigLIP (sigmoid) without the N x M matrix of logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from limber_fast import checks, dispatch
from limber_fast.ops import info_nce_group, registration
from limber_fast.ops.info_nce_op import (
    LOSS,
    LSE_EXPONENT,
    LSE_REMAINDER,
    InfoNceRequest,
    InfoNceState,
    kept_bytes,
    state_fields,
)

__all__ = ["InfoNceRequest", "InfoNceState", "InfoNceStats", "info_nce", "state_fields"]

_OP = "info_nce"
_LN2 = 0.6931471805599453
_INT32_SAFE = (torch.int8, torch.uint8, torch.int16, torch.int32)


class InfoNceStats(NamedTuple):
    """Detached by-products of one `info_nce` call; None where the loss does not define one.

    Attributes:
        image_log_sum_exp: [N] fp32, log sum_j exp x_ij in nats (softmax variant).
        text_log_sum_exp: [M] fp32, log sum_i exp x_ij in nats (symmetric softmax).
        loss_per_row: [N] fp32, the loss of each pair before weights.
        image_accuracy: 0-d fp32, share of images whose positive lies strictly above every other candidate.
        text_accuracy: 0-d fp32, the same for texts (symmetric softmax).
    """

    image_log_sum_exp: Tensor | None
    text_log_sum_exp: Tensor | None
    loss_per_row: Tensor
    image_accuracy: Tensor
    text_accuracy: Tensor | None


def typical_request(device: torch.device) -> InfoNceRequest:
    """The call that `limber-fast env` asks the backends about."""
    return InfoNceRequest(device, torch.float32, 1024, 1024, 0, 512, "softmax", False)


def info_nce(
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    *,
    logit_bias: float | Tensor | None = None,
    labels: Tensor | None = None,
    ids: Tensor | tuple[Tensor, Tensor] | None = None,
    extra_negatives: Tensor | None = None,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    normalize: bool = False,
    variant: str = "softmax",
    symmetric: bool = True,
    reduction: str = "mean",
    return_stats: bool = False,
    cache_mb: float = 256,
    backend: str = "auto",
    group: Any = None,
) -> Tensor | tuple[Tensor, InfoNceStats]:
    """Contrastive loss of two towers of features, never holding their N x M logits.

    With logits ``x_ij = logit_scale * <image_i, text_j> + logit_bias``, positive column ``y = labels[i]`` and
    candidates ``j`` (all columns but those masked by `ids`)::

        softmax:  row_i  = log sum_j exp x_ij - (1 - eps) x_iy - eps mean_j x_ij
                  col_j  = the same down column j (text columns only)
                  loss_i = (row_i + col_y) / 2 if symmetric else row_i
        sigmoid:  loss_i = sum_j log(1 + exp(-z_ij x_ij)),  z_ij = 1 for the positive, else -1
        mean: sum_i w_i loss_i / sum_i w_i    sum: sum_i w_i loss_i    none: w_i loss_i

    Args:
        image: [N, D] fp16|bf16|fp32 (fp64 runs on the eager backend). Any row stride (slices, expanded rows); a
            tensor that is not contiguous in D is copied.
        text: [M, D], the dtype and device of `image`; may be the same tensor.
        logit_scale: number, or floating tensor with one element, which gets its gradient. The factor itself, not its
            logarithm; zero and negative values are allowed.
        logit_bias: number, or floating tensor with one element. Its gradient is exactly 0 in the softmax variant.
        labels: [N] integers in [0, M), the positive column of each row; default row i, which needs N == M. A symmetric
            loss needs N == M and a permutation. Checking the values waits for the device.
        ids: [N] integers (N == M), or a pair (image_ids [N], text_ids [M]): image i and text j with equal ids are
            never each other's negatives.
        extra_negatives: [K, D], further candidates of the image-to-text direction.
        weights: [N] floating constants, one per pair.
        label_smoothing: eps in [0, 1), spread evenly over the candidates; softmax variant only.
        normalize: divide the rows by max(L2 norm, 1e-12) first, inside the op. The gradient of an all-zero row is
            divided by 1e-12 too: in fp16 it overflows to inf, as through torch.nn.functional.normalize.
        variant: 'softmax' (CLIP) or 'sigmoid' (SigLIP).
        symmetric: both directions, or image-to-text alone. Without meaning in the sigmoid variant.
        reduction: 'mean', 'sum' or 'none'.
        return_stats: also return `InfoNceStats`.
        cache_mb: MiB of tiles that the forward pass may keep for the backward pass (6 N M D flop instead of 8 where
            all fit; on the CPU 10 instead of 8 for 16-bit images of more than 64 Mi values beside more text rows than
            96 MiB of panels hold); 0 turns it off, inf keeps all. Nothing is kept where no tower needs a gradient, and
            on a GPU the norms alone, with `normalize`. The last bits of the loss may depend on it.
        backend: 'auto', 'cpu', 'cuda', 'triton' or 'eager'; see `limber_fast.use_backend`.
        group: a torch.distributed process group, such as torch.distributed.group.WORLD: image and text are this rank's
            rows (any number of them) and the loss is that of the rows of all ranks. See below.

    Over a group:
        The loss, and the gradients of logit_scale and logit_bias, are those of one process with all rows, equal on
        all ranks. The gradients of this rank's towers are group size x those of one process: DDP, which averages over
        ranks, then gives every parameter the gradient of one process. Every rank must pass the same logit_scale and
        logit_bias and scale the loss alike; statistics are of this rank's rows. All ranks call the forward pass; the
        backward pass sends nothing. labels, extra_negatives, symmetric=False and reduction='none' are refused, as are
        weights in the sigmoid variant. Under torch.compile the graph breaks.
        Saved for backward: both towers of all ranks too, [2 N, D]; never N x N values, nor gradients of other ranks.

    Returns:
        The loss, fp32 (fp64 for fp64 towers): 0-d, or [N] for reduction='none'. With return_stats, (loss, stats).
        Gradients reach the towers, extra_negatives, logit_scale and logit_bias; a frozen tower costs nothing.
        NaN and Inf propagate as in eager PyTorch. Results do not depend on the number of threads (own kernels).

    Under torch.autocast the towers and extra_negatives are cast as for a matrix product and logit_scale stays fp32.

    Saved for backward: the arguments, four fp32 numbers per row and column (six with label smoothing), and the cache.

    Raises:
        ValueError: a shape or value breaks the contract above. TypeError: a dtype or kind does.
        BackendUnavailable: the named backend cannot run this call.
        RuntimeError: a second derivative, forward-mode differentiation, torch.vmap or a torch.func transform.

    Source: Radford et al., arXiv 2103.00020, figure 3; Zhai et al., arXiv 2303.15343, algorithm 1.
    """
    if group is not None:
        checks.over_group(_OP, group)
    try:
        checks.choice(_OP, "variant", variant, ("softmax", "sigmoid"))
        checks.choice(_OP, "reduction", reduction, ("mean", "sum", "none"))
        checks.choice(_OP, "backend", backend, dispatch.CHOICES)
        for name, flag in (("normalize", normalize), ("symmetric", symmetric), ("return_stats", return_stats)):
            checks.flag(_OP, name, flag)
        if group is not None:
            given = {"labels": labels is not None, "extra_negatives": extra_negatives is not None,
                     "symmetric=False": not symmetric, "reduction='none'": reduction == "none",
                     "weights with variant='sigmoid'": weights is not None and variant == "sigmoid"}  # fmt: skip
            checks.not_over_group(_OP, given)
        checks.label_smoothing(_OP, label_smoothing, variant)
        checks.not_negative(_OP, "cache_mb", cache_mb)
        image, text, extra_negatives = _towers(image, text, extra_negatives)
        n, m = image.shape[0], text.shape[0]
        symmetric = symmetric and variant == "softmax"
        logit_scale = _scalar("logit_scale", logit_scale, image)
        logit_bias = None if logit_bias is None else _scalar("logit_bias", logit_bias, image)
        labels = _labels(labels, image, m, symmetric)
        ids = None if ids is None else _id_pair(ids, image, m)
        if weights is not None:
            checks.vector(_OP, "weights", weights, n, "N", "image", image)
            checks.constant_weights(_OP, weights)
            weights = weights.to(logit_scale.dtype)
    except (TypeError, ValueError):
        if group is not None:
            info_nce_group.report_failure(group)
        raise

    differentiated = any(x is not None and x.requires_grad for x in (image, text, extra_negatives))
    cache_bytes = int(min(cache_mb, 2**40) * 2**20) if torch.is_grad_enabled() and differentiated else 0
    if group is not None:
        options = info_nce_group.Options(float(label_smoothing), normalize, variant, reduction, return_stats,
                                         cache_bytes, dispatch.preferred(backend))  # fmt: skip
        loss, *state = info_nce_group.info_nce_group(image, text, logit_scale, logit_bias, ids, weights, group, options)
    else:
        candidates = m + (0 if extra_negatives is None else extra_negatives.shape[0])
        image_ids, text_ids = (None, None) if ids is None else _int32(*ids)
        loss, *state, _ = registration.call(
            torch.ops.limber_fast.info_nce_fwd.default,
            image, text, logit_scale, logit_bias, extra_negatives, labels, image_ids, text_ids, weights,
            float(label_smoothing), normalize, variant, symmetric, reduction, return_stats,
            kept_bytes(image, candidates, normalize, cache_bytes), dispatch.preferred(backend),
        )  # fmt: skip
    if not return_stats:
        return loss
    return loss, _stats(*state, logit_bias, labels, variant == "softmax", symmetric)


def _towers(image: Tensor, text: Tensor, extra: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    checks.matrix(_OP, "image", image, "[N, D]")
    checks.matrix(_OP, "text", text, "[M, D]")
    if extra is not None:
        checks.matrix(_OP, "extra_negatives", extra, "[K, D]")
    checks.has_data(_OP, "image", image)
    image, text, extra = registration.autocast(image, text, extra)
    checks.same_features(_OP, "text", text, "image", image)
    if extra is not None:
        checks.same_features(_OP, "extra_negatives", extra, "image", image)
    return _unit_stride(image), _unit_stride(text), None if extra is None else _unit_stride(extra)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _scalar(name: str, x: float | Tensor, image: Tensor) -> Tensor:
    dtype = torch.float64 if image.dtype == torch.float64 else torch.float32
    checks.number(_OP, name, x, dtype)
    if not isinstance(x, Tensor):
        return torch.full((), x if isinstance(x, (int, float)) else float(x), dtype=dtype, device=image.device)
    if x.ndim:
        x = x.reshape(())
    return x if x.dtype == dtype and x.device == image.device else x.to(image.device, dtype)


def _labels(labels: Tensor | None, image: Tensor, m: int, symmetric: bool) -> Tensor | None:
    n = image.shape[0]
    if labels is None:
        checks.square(_OP, n, m)
        return None
    checks.vector(_OP, "labels", labels, n, "N", "image", image)
    checks.integer(_OP, "labels", labels)
    if symmetric:
        checks.symmetric_rectangle(_OP, n, m)
    return torch.ops.limber_fast.info_nce_labels(labels, m, symmetric)


def _id_pair(ids: Tensor | tuple[Tensor, Tensor], image: Tensor, m: int) -> tuple[Tensor, Tensor]:
    n = image.shape[0]
    if isinstance(ids, Tensor):
        checks.shared_ids(_OP, n, m)
        ids = (ids, ids)
    checks.id_pair(_OP, ids)
    for name, x, length, letter in (("image_ids", ids[0], n, "N"), ("text_ids", ids[1], m, "M")):
        checks.vector(_OP, name, x, length, letter, "image", image)
        checks.integer(_OP, name, x)
    return tuple(ids)


def _int32(image_ids: Tensor, text_ids: Tensor) -> tuple[Tensor, Tensor]:
    if image_ids.dtype in _INT32_SAFE and text_ids.dtype in _INT32_SAFE:
        return image_ids.to(torch.int32).contiguous(), text_ids.to(torch.int32).contiguous()
    return torch.ops.limber_fast.info_nce_ids(image_ids, text_ids)


def _stats(
    row: Tensor, col: Tensor, row_correct: Tensor, col_correct: Tensor, bias: Tensor | None, labels: Tensor | None,
    softmax: bool, symmetric: bool,
) -> InfoNceStats:  # fmt: skip
    def log_sum_exp(fields: Tensor) -> Tensor:
        nats = (fields[LSE_EXPONENT] + fields[LSE_REMAINDER]) * _LN2
        return nats if bias is None else nats + bias.detach()

    loss = row[LOSS].clone()
    if symmetric:
        loss = (loss + (col[LOSS] if labels is None else col[LOSS][labels.long()])) / 2
    return InfoNceStats(
        image_log_sum_exp=log_sum_exp(row) if softmax else None,
        text_log_sum_exp=log_sum_exp(col) if symmetric else None,
        loss_per_row=loss,
        image_accuracy=row_correct.to(row.dtype).mean(),
        text_accuracy=col_correct.to(row.dtype).mean() if symmetric else None,
    )
