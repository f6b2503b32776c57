"""frozen_cross_entropy: cross entropy through a frozen int8 vocabulary, never holding its logits."""

from __future__ import annotations

import torch
from torch import Tensor

from limber_fast import checks, dispatch
from limber_fast.ops import registration
from limber_fast.ops.frozen_cross_entropy_op import FrozenCrossEntropyRequest
from limber_fast.ops.int8_weight import Int8Weight

__all__ = ["FrozenCrossEntropyRequest", "frozen_cross_entropy"]

_OP = "frozen_cross_entropy"


def typical_request(device: torch.device) -> FrozenCrossEntropyRequest:
    """The call that `limber-fast env` asks the backends about."""
    return FrozenCrossEntropyRequest(device, torch.bfloat16, 2048, 4096, 50400)


def frozen_cross_entropy(
    hidden: Tensor,
    weight: Int8Weight,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Cross entropy of the logits that a frozen int8 head gives, of the labelled rows alone.

    With the scales s and integers q of `weight`::

        z[..., v] = s[v] sum_d hidden[..., d] q[v, d] + bias[v]
        loss[...] = log sum_v exp z[..., v] - z[..., labels[...]],  0 where labels is ignore_index
        mean: sum of loss / number of labels that are not ignore_index    sum: sum of loss    none: loss

    The vocabulary goes by in chunks. The gradient of hidden is made beside the loss where one is needed: that takes 4
    flop per element of the weight and labelled row instead of the 6 of a backward pass that computes the logits again.
    Rows without a label cost neither. Products are those of `int8_linear`'s w8a16: hidden and the exponentials in
    16-bit fixed point on the CPU, row by row. Losses and gradients that are nearly 0 keep their relative precision.

    Args:
        hidden: [..., D] fp16|bf16|fp32 (fp64 runs on the eager backend), after the last LayerNorm. Any strides; one
            that is not contiguous in D is copied.
        weight: of shape (V, D), by `quantize_int8` or `Int8Weight.load`, on the device of `hidden`. Frozen, as is
            `bias`.
        bias: [V] fp16|bf16|fp32, or None. Elements of -inf take a token out of the vocabulary.
        labels: [...] integers within 0..V - 1, or ignore_index; not shifted: labels[..., i] is what hidden[..., i]
            predicts. Checking the values waits for the device.
        ignore_index: the label of rows that have no loss and a gradient of 0.
        reduction: 'mean', 'sum' or 'none'.
        backend: 'auto', 'cpu', 'cuda', 'triton' or 'eager'; see `limber_fast.use_backend`.

    Returns:
        The loss, fp32 (fp64 for fp64 rows): 0-d, or [...] for reduction='none'. A mean over no label is NaN, and its
        gradient 0, as in eager PyTorch. The gradient reaches `hidden` alone. A row whose logits hold NaN or +Inf has
        the loss and gradient NaN. Results do not depend on the number of threads (own kernels).

    Under torch.autocast hidden is cast as for nn.Linear; the loss stays fp32.

    Saved for backward: d loss[...] / d hidden [..., D] in the dtype of `hidden`, and labels; neither hidden nor the
    weight.

    Raises:
        ValueError: a shape or value breaks the contract above; a bias that requires grad. TypeError: a dtype or kind
            does.
        BackendUnavailable: the named backend cannot run this call.
        RuntimeError: a second derivative, forward-mode differentiation, torch.vmap or a torch.func transform.

    Source: Wijmans et al., arXiv 2411.09009, section 4 (logits by chunks of the vocabulary); Milakov and Gimelshein,
    arXiv 1805.02867 (a softmax whose maximum is not known in advance).
    """
    checks.choice(_OP, "backend", backend, dispatch.CHOICES)
    checks.choice(_OP, "reduction", reduction, ("mean", "sum", "none"))
    checks.int8_weight(_OP, weight, Int8Weight)
    vocabulary, features = weight.shape
    checks.hidden_rows(_OP, hidden, features, weight.packed)
    checks.row_labels(_OP, labels, hidden)
    checks.token_id(_OP, "ignore_index", ignore_index)
    (hidden,) = registration.autocast(hidden)
    if bias is not None:
        checks.frozen_bias(_OP, bias, vocabulary, hidden, name="hidden", letter="V")
        bias = bias.detach().to(torch.float64 if hidden.dtype == torch.float64 else torch.float32).contiguous()
    rows = hidden.reshape(-1, features)
    flat = labels.reshape(-1).to(torch.int64).contiguous()
    losses, _ = registration.call(
        torch.ops.limber_fast.frozen_cross_entropy_fwd.default,
        rows if rows.stride(-1) == 1 else rows.contiguous(), weight.packed, weight.scales, weight.row_sums,
        weight.column_sums, bias, flat, int(ignore_index), False, dispatch.preferred(backend),
    )  # fmt: skip
    if reduction == "none":
        return losses.reshape(labels.shape)
    return losses.sum() if reduction == "sum" else losses.sum() / (flat != ignore_index).sum()
