"""`torch.ops.limber_fast.info_nce_*`: schemas, fake kernels, autograd and vmap of the InfoNCE op.

The backend is chosen inside the op bodies, so torch.compile sees opaque ops. The public function, with its
documentation and argument checks, is `limber_fast.ops.info_nce.info_nce`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from limber_fast import checks, dispatch
from limber_fast.ops import registration

# Fields (first index) of InfoNceState.row and .col.
LSE_EXPONENT, LSE_REMAINDER, LOSS, DSCALE, NLL, UNIFORM = range(6)
DBIAS = LSE_EXPONENT  # of the sigmoid variant, which has no log-sum-exp

_DENSE = "the dense formula, limber_fast.reference.info_nce, has every derivative"


class InfoNceState(NamedTuple):
    """What a forward pass leaves for the statistics and the backward pass.

    Attributes:
        row: [4, N] fp32 (fp64 for fp64 towers), [6, N] with label smoothing, one column of fields per image row:
            LSE_EXPONENT, LSE_REMAINDER: log-sum-exp in units of log 2 and without bias, an integer and the rest in
                [-1/2, 1/2], so that large logits cost no digits: nats = ln 2 * (exponent + remainder) + bias.
                Sigmoid variant: d loss / d bias (DBIAS) and 0.
            LOSS: in full relative precision. DSCALE: d LOSS / d scale.
            NLL, with label smoothing (else it is LOSS): -log p(positive), in full relative precision.
            UNIFORM, with label smoothing: eps / C, the smoothing mass per candidate.
        col: [4 or 6, M], the same per text row; zeros where the loss has no text-to-image direction.
        row_correct, col_correct: [N], [M] uint8, whether the positive lies strictly above every other candidate;
            empty unless statistics were asked for.
        cache: [cache_bytes] uint8, private to the backend that wrote it.
    """

    row: Tensor
    col: Tensor
    row_correct: Tensor
    col_correct: Tensor
    cache: Tensor


def state_fields(label_smoothing: float) -> int:
    """How many fields a state has."""
    return 6 if label_smoothing > 0 else 4


def kept_bytes(image: Tensor, candidates: int, normalize: bool, budget: int) -> int:
    """Size of a state's cache: on the CPU a value per pair, padded to the tiles of any backend, within the budget;
    kernels of other devices keep the norms of all rows alone, those of each tower from a multiple of 16 bytes on.
    """
    if image.device.type == "cpu":
        return min(budget, (image.shape[0] + 64) * (candidates + 1024) * 4)
    return min(budget, 4 * (image.shape[0] + candidates) + 48) if normalize else 0


class InfoNceRequest(NamedTuple):
    """What a backend is told when it is asked whether it can run a call."""

    device: torch.device
    dtype: torch.dtype
    N: int
    M: int
    K: int
    D: int
    variant: str
    normalize: bool


def _backend(backend: str, image: Tensor, text: Tensor, extra: Tensor | None, variant: str, normalize: bool) -> Any:
    (n, d), m, k = image.shape, text.shape[0], 0 if extra is None else extra.shape[0]
    request = InfoNceRequest(image.device, image.dtype, n, m, k, d, variant, normalize)
    return dispatch.select("info_nce", request, backend)


def _total(module: Any) -> Callable[..., float] | None:
    """The backend's own sum of a field of the state, where it has one: about ten small torch ops less, each cold after
    the kernels, 0.12 of 4 ms at N = 256 on Zen 3."""
    return getattr(module, "info_nce_total", None)


def _sum(x: Tensor) -> Tensor:
    # torch splits a full sum of more than 32768 numbers by thread; shorter pieces add up alike on any thread count.
    return x.sum() if x.numel() <= 16384 else torch.stack([piece.sum() for piece in x.split(16384)]).sum()


def _reduce(
    state: InfoNceState, labels: Tensor | None, weights: Tensor | None, symmetric: bool, reduction: str,
    total: Callable[..., float] | None = None,
) -> Tensor:  # fmt: skip
    if weights is None and reduction != "none":  # the order of the pairs does not matter
        row, col = state.row, state.col if symmetric else None
        divisor = (2 if symmetric else 1) * (row.shape[1] if reduction == "mean" else 1)
        if total is not None:
            return torch.full((), total(row, col, LOSS) / divisor, dtype=row.dtype)
        return _sum(row[LOSS] if col is None else row[LOSS] + col[LOSS]).div_(divisor)
    row, col = state.row[LOSS], state.col[LOSS]
    loss = (row + (col if labels is None else col[labels.long()])) / 2 if symmetric else row
    loss = loss.clone() if weights is None else loss * weights
    if reduction == "none":
        return loss
    return _sum(loss) / _sum(weights) if reduction == "mean" else _sum(loss)


def _direction_gradients(
    grad: Tensor, n: int, labels: Tensor | None, weights: Tensor | None, symmetric: bool, reduction: str
) -> tuple[Tensor, Tensor | None]:
    """d loss / d row loss [N] and, for the symmetric loss, d loss / d column loss [M]."""
    divisor = (1 if reduction != "mean" else n if weights is None else _sum(weights)) * (2 if symmetric else 1)
    if grad.numel() == 1 and weights is None and grad.device.type == "cpu":
        row = torch.full((n,), grad.item() / divisor, dtype=grad.dtype)
    else:
        grad = grad / divisor
        row = (grad.expand(n) if weights is None else grad * weights).contiguous()
    if not symmetric or labels is None:
        return row, row if symmetric else None
    return row, torch.empty_like(row).index_copy_(0, labels.long(), row)


def _forward(
    image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor | None, extra_negatives: Tensor | None,
    labels: Tensor | None, image_ids: Tensor | None, text_ids: Tensor | None, weights: Tensor | None,
    label_smoothing: float, normalize: bool, variant: str, symmetric: bool, reduction: str, with_stats: bool,
    cache_bytes: int, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    module = _backend(backend, image, text, extra_negatives, variant, normalize)
    state = module.info_nce_fwd(
        image, text, extra_negatives, logit_scale, logit_bias, labels, image_ids, text_ids,
        label_smoothing=label_smoothing, normalize=normalize, variant=variant, symmetric=symmetric,
        with_stats=with_stats, cache_bytes=cache_bytes,
    )  # fmt: skip
    return _reduce(state, labels, weights, symmetric, reduction, _total(module)), *state


def _forward_fake(
    image, text, logit_scale, logit_bias, extra_negatives, labels, image_ids, text_ids, weights, label_smoothing,
    normalize, variant, symmetric, reduction, with_stats, cache_bytes, backend,
):  # fmt: skip
    n, m, new = image.shape[0], text.shape[0], logit_scale.new_empty
    loss = new(n if reduction == "none" else ())
    correct = [image.new_empty(size if with_stats else 0, dtype=torch.uint8) for size in (n, m)]
    fields = state_fields(label_smoothing)
    return loss, new(fields, n), new(fields, m), *correct, image.new_empty(cache_bytes, dtype=torch.uint8)


def _backward(
    grad: Tensor, image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor | None,
    extra_negatives: Tensor | None, labels: Tensor | None, image_ids: Tensor | None, text_ids: Tensor | None,
    weights: Tensor | None, row: Tensor, col: Tensor, cache: Tensor, label_smoothing: float, normalize: bool,
    variant: str, symmetric: bool, reduction: str, backend: str, needs: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    need_image, need_text, need_scale, need_bias, need_extra = needs
    row_grad, col_grad = _direction_gradients(grad, image.shape[0], labels, weights, symmetric, reduction)
    d_image = d_text = d_extra = d_scale = d_bias = None
    module = _backend(backend, image, text, extra_negatives, variant, normalize)
    if need_image or need_text or need_extra:
        state = InfoNceState(row, col, cache, cache, cache)  # it reads no accuracies
        d_image, d_text, d_extra = module.info_nce_bwd(
            image, text, extra_negatives, logit_scale, logit_bias, labels, image_ids, text_ids, row_grad, col_grad,
            state, label_smoothing=label_smoothing, normalize=normalize, variant=variant, symmetric=symmetric,
            need_image=need_image, need_text=need_text, need_extra=need_extra,
        )  # fmt: skip
    if need_scale:
        if weights is None and reduction != "none" and (total := _total(module)) is not None:
            factor = row_grad[0].item()  # of every row and column
            sums = total(row, None if col_grad is None else col, DSCALE)
            d_scale = torch.full((), factor * sums, dtype=row.dtype)
        else:
            d_scale = _sum(row_grad * row[DSCALE])
            if col_grad is not None:
                d_scale = d_scale + _sum(col_grad * col[DSCALE])
    if need_bias:  # a softmax is blind to a shift of its logits
        d_bias = _sum(row_grad * row[DBIAS]) if variant == "sigmoid" else torch.zeros_like(logit_scale)
    return tuple(image.new_empty(0) if g is None else g for g in (d_image, d_text, d_scale, d_bias, d_extra))


def _backward_fake(
    grad, image, text, logit_scale, logit_bias, extra_negatives, labels, image_ids, text_ids, weights, row, col, cache,
    label_smoothing, normalize, variant, symmetric, reduction, backend, needs,
):  # fmt: skip
    inputs = (image, text, logit_scale, logit_bias, extra_negatives)
    return tuple(x.new_empty(x.shape) if need else image.new_empty(0) for x, need in zip(inputs, needs, strict=True))


class _InfoNce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = registration.below_autograd(torch.ops.limber_fast.info_nce_fwd.default, *inputs)
        _, row, col, _, _, cache = output
        ctx.save_for_backward(*inputs[:9], row, col, cache)
        ctx.options = *inputs[9:14], inputs[16]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 17
        needs = list(ctx.needs_input_grad[:5])
        gradients = registration.run_backward(
            torch.ops.limber_fast.info_nce_bwd.default, grad, *ctx.saved_tensors, *ctx.options, needs
        )
        return *(g if need else None for g, need in zip(gradients, needs, strict=True)), *(None,) * 12


def _int32_labels(labels: Tensor, m: int, permutation: bool) -> Tensor:
    labels = labels.to(torch.int64)
    checks.label_range("info_nce", int(labels.min()), int(labels.max()), m)
    if permutation:
        checks.permutation("info_nce", bool((torch.bincount(labels, minlength=m) == 1).all()))
    return labels.to(torch.int32)


def _int32_ids(image_ids: Tensor, text_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The same equalities in 32 bits: the ids themselves where they fit, else their ranks among all ids."""
    both, limits = torch.cat([image_ids.to(torch.int64), text_ids.to(torch.int64)]), torch.iinfo(torch.int32)
    if both.min() < limits.min or both.max() > limits.max:
        both = both.unique(return_inverse=True)[1]
    image_ids, text_ids = both.to(torch.int32).split([len(image_ids), len(text_ids)])
    return image_ids.clone(), text_ids.clone()


def _int32_like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.int32)


_OPTIONS = "float label_smoothing, bool normalize, str variant, bool symmetric, str reduction"
_INPUTS = (
    "Tensor image, Tensor text, Tensor logit_scale, Tensor? logit_bias, Tensor? extra_negatives, Tensor? labels, "
    "Tensor? image_ids, Tensor? text_ids, Tensor? weights"
)
_NO_VMAP = "info_nce: torch.vmap is not supported (rows are negatives of each other); loop over batches"
registration.define(
    f"info_nce_fwd({_INPUTS}, {_OPTIONS}, bool with_stats, SymInt cache_bytes, str backend) -> "
    "(Tensor loss, Tensor row, Tensor col, Tensor row_correct, Tensor col_correct, Tensor cache)",
    _forward, _forward_fake, _NO_VMAP,
)  # fmt: skip
registration.define(
    f"info_nce_bwd(Tensor grad, {_INPUTS}, Tensor row, Tensor col, Tensor cache, {_OPTIONS}, str backend, "
    "bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward, _backward_fake, _NO_VMAP,
)  # fmt: skip
registration.define(
    "info_nce_labels(Tensor labels, SymInt m, bool permutation) -> Tensor",
    _int32_labels, lambda labels, m, permutation: _int32_like(labels), _NO_VMAP,
)  # fmt: skip
registration.define(
    "info_nce_ids(Tensor image_ids, Tensor text_ids) -> (Tensor, Tensor)",
    _int32_ids, lambda image_ids, text_ids: (_int32_like(image_ids), _int32_like(text_ids)), _NO_VMAP,
)  # fmt: skip

_FORWARD, _BACKWARD = torch.ops.limber_fast.info_nce_fwd.default, torch.ops.limber_fast.info_nce_bwd.default
registration.differentiate(_FORWARD, _InfoNce, "info_nce", _DENSE)
registration.differentiate(
    _BACKWARD, registration.not_differentiable(_BACKWARD, "info_nce", _DENSE), "info_nce", _DENSE
)
