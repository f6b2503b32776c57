"""`info_nce` over the processes of a torch.distributed group: the loss of all their rows together.

Of R ranks, rank r has N_r of the N rows. It gathers both towers once and owns two slabs of the N x N logits, its images
against all texts and its texts against all images, which the op's own kernels visit tile by tile. Forward, each slab
gives whole row (or column) states, which are gathered, 8 numbers a row (12 with label smoothing). Backward, the states
of all rows and columns make either slab's gradient complete: nothing is sent, and no gradient of a row that lives
elsewhere is ever computed.

Per rank, with N = R n, against a ring in which texts and the sums of their gradients travel:

    gather   2 N D elements received; 2 N D held until the backward pass; 12 N n D flop (8 with the slabs in the cache)
    ring     N D received forward, 3 N D backward (sums in fp32 beside 16-bit texts); a few n D held; 8 N n D flop

The ring holds less: at N = 32768, D = 512 in bf16 64 MiB less, next to activations of gigabytes. It pays with twice the
traffic, 2 R dependent steps of R^2-th parts of the problem, and a backward pass that waits for every other rank's. The
loss's own arithmetic is a percent of the encoders' either way.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo

from limber_fast import checks
from limber_fast.ops.info_nce_op import (
    DBIAS,
    DSCALE,
    InfoNceState,
    _backend,
    _direction_gradients,
    _reduce,
    _sum,
    kept_bytes,
    state_fields,
)

_OP = "info_nce"


class Options(NamedTuple):
    """What must be alike on all ranks, and the budget of the tile caches in bytes."""

    label_smoothing: float
    normalize: bool
    variant: str
    reduction: str
    with_stats: bool
    cache_bytes: int
    backend: str


def _all_gather(out: Tensor, mine: Tensor, group: Any) -> None:
    # torch 2.14 gave it its new name.
    (getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor)(out, mine, group=group)


def _exchange(group: Any, facts: dict[str, float] | None) -> list[dict[str, float]] | None:
    """The facts of every rank; None where some rank has none to give. One small message: 8 bytes a fact."""
    size, names = dist.get_world_size(group), checks.GROUP_FACTS
    device = "cpu" if "cpu:" in dist.get_backend_config(group) else torch.device("cuda", torch.cuda.current_device())
    mine = [0.0] * (1 + len(names)) if facts is None else [1.0, *(float(facts[name]) for name in names)]
    table = torch.empty(size * len(mine), dtype=torch.float64, device=device)
    _all_gather(table, torch.tensor(mine, dtype=torch.float64, device=device), group)
    ranks = table.view(size, -1).tolist()
    if facts is not None:
        checks.right_on_every_rank(_OP, [rank for rank, (right, *_) in enumerate(ranks) if not right])
    return [dict(zip(names, values, strict=True)) for _, *values in ranks]


def report_failure(group: Any) -> None:
    """Called on a rank that is about to raise for its arguments: the others, waiting for its facts, raise too."""
    _exchange(group, None)


def _gather(x: Tensor, sizes: list[int], group: Any) -> Tensor:
    """x: [N_r, C] of every rank, one below the other: [N, C]."""
    most = max(sizes)
    padded = (x if len(x) == most else F.pad(x, (0, 0, 0, most - len(x)))).contiguous()
    out = x.new_empty(len(sizes) * most, x.shape[1])
    # As bytes: gloo does not know every dtype.
    _all_gather(out.view(torch.uint8), padded.view(torch.uint8), group)
    if min(sizes) == most:
        return out
    return torch.cat([rows[:size] for rows, size in zip(out.split(most), sizes, strict=True)])


class _GroupInfoNce(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor | None, ids: Tensor | None,
        weights: Tensor | None, group: Any, sizes: list[int], options: Options,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        n, d = image.shape
        rank, total = dist.get_rank(group), sum(sizes)
        start = sum(sizes[:rank])
        softmax = options.variant == "softmax"
        both = _gather(torch.stack([image, text], 1).flatten(1), sizes, group).view(total, 2, d)
        all_ids = None
        if ids is not None:
            # Ids of all ranks before they are shortened to 32 bits: by rank they would not agree.
            pair = torch.ops.limber_fast.info_nce_ids(*_gather(ids, sizes, group).unbind(1))
            all_ids = torch.stack(pair)
        labels = torch.arange(start, start + n, dtype=torch.int32, device=image.device)
        ctx.own, ctx.group_size, ctx.options = slice(start, start + n), len(sizes), options

        needs = ctx.needs_input_grad[:2]
        budget = options.cache_bytes // 2 if softmax and all(needs) else options.cache_bytes
        cache = kept_bytes(image, total, options.normalize, budget)

        def states(side: int, own: Tensor) -> InfoNceState:
            own_ids, other_ids = _slab_ids(all_ids, side, ctx.own)
            module = _backend(options.backend, own, both[:, 1 - side], None, options.variant, options.normalize)
            return module.info_nce_fwd(
                own, both[:, 1 - side], None, logit_scale, logit_bias, labels, own_ids, other_ids,
                label_smoothing=options.label_smoothing, normalize=options.normalize, variant=options.variant,
                symmetric=False, with_stats=options.with_stats, cache_bytes=cache if needs[side] else 0,
            )  # fmt: skip

        row = states(0, image)
        # The sigmoid loss has one direction: its texts meet the images in the backward pass alone.
        nothing = image.new_empty(0, dtype=torch.uint8)
        zeros = InfoNceState(torch.zeros_like(row.row), nothing, nothing, torch.zeros_like(row.row_correct), nothing)
        col = states(1, text) if softmax else zeros
        parts = [row.row, col.row, *([] if weights is None else [weights[None]])]
        gathered = _gather(torch.cat(parts).T, sizes, group).T.contiguous()
        all_row, all_col, all_weights = _parts(gathered, options)
        loss = _reduce(InfoNceState(all_row, all_col, nothing, nothing, nothing), None, all_weights, softmax,
                       options.reduction)  # fmt: skip
        ctx.save_for_backward(image, text, logit_scale, logit_bias, both, labels, all_ids, gathered, row.row, col.row,
                              row.cache, col.cache)  # fmt: skip
        col_correct = col.row_correct
        ctx.mark_non_differentiable(row.row, col.row, row.row_correct, col_correct)
        ctx.set_materialize_grads(False)
        return loss, row.row, col.row, row.row_correct, col_correct

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 9
        if torch.is_grad_enabled():  # create_graph=True: torch's once_differentiable lets some of its uses through
            raise RuntimeError(f"{_OP}: over a group its gradient cannot be differentiated; use create_graph=False")
        (image, text, logit_scale, logit_bias, both, labels, all_ids, gathered, row, col, row_cache,
         col_cache) = ctx.saved_tensors  # fmt: skip
        options, own, softmax = ctx.options, ctx.own, ctx.options.variant == "softmax"
        all_row, all_col, weights = _parts(gathered, options)
        row_grad, col_grad = _direction_gradients(grad, len(both), None, weights, softmax, options.reduction)
        nothing = image.new_empty(0, dtype=torch.uint8)

        def gradient(side: int, x: Tensor, state: Tensor, others: Tensor, cache: Tensor) -> Tensor:
            own_ids, other_ids = _slab_ids(all_ids, side, own)
            # Both directions weigh a pair alike. Times the group's size, for DDP divides the sum over ranks by it.
            direction = ctx.group_size * row_grad
            state = InfoNceState(state, others, nothing, nothing, cache)
            module = _backend(options.backend, x, both[:, 1 - side], None, options.variant, options.normalize)
            return module.info_nce_bwd(
                x, both[:, 1 - side], None, logit_scale, logit_bias, labels, own_ids, other_ids,
                direction[own].contiguous(), direction if softmax else None, state,
                label_smoothing=options.label_smoothing, normalize=options.normalize, variant=options.variant,
                symmetric=softmax, need_image=True, need_text=False, need_extra=False,
            )[0]  # fmt: skip

        need_image, need_text, need_scale, need_bias = ctx.needs_input_grad[:4]
        d_image = gradient(0, image, row, all_col, row_cache) if need_image else None
        d_text = gradient(1, text, col, all_row, col_cache) if need_text else None
        d_scale = d_bias = None
        if need_scale:
            d_scale = _sum(row_grad * all_row[DSCALE])
            if col_grad is not None:
                d_scale = d_scale + _sum(col_grad * all_col[DSCALE])
        if need_bias:  # a softmax is blind to a shift of its logits
            d_bias = torch.zeros_like(logit_scale) if softmax else _sum(row_grad * all_row[DBIAS])
        return d_image, d_text, d_scale, d_bias, None, None, None, None, None


def _parts(gathered: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor | None]:
    """States of all rows and of all columns, and the weights where there are any."""
    fields = state_fields(options.label_smoothing)
    row, col, weights = gathered.tensor_split([fields, 2 * fields])
    return row, col, weights[0] if len(weights) else None


def _slab_ids(all_ids: Tensor | None, side: int, own: slice) -> tuple[Tensor | None, Tensor | None]:
    """Ids of a slab's rows and columns; side 0: own images against all texts, 1: own texts against all images."""
    return (None, None) if all_ids is None else (all_ids[side, own].contiguous(), all_ids[1 - side].contiguous())


@_disable_dynamo  # as torch.compiler.disable, which would import the compiler with this module
def info_nce_group(
    image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor | None, ids: tuple[Tensor, Tensor] | None,
    weights: Tensor | None, group: Any, options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss of the whole group, and this rank's row and column states and top-1 flags; arguments are checked already."""
    facts = {
        "rows": len(image), "D": image.shape[1], "dtype": checks.FLOATS.index(image.dtype),
        "variant": options.variant == "sigmoid", "label_smoothing": options.label_smoothing,
        "normalize": options.normalize, "reduction": options.reduction == "sum", "ids": ids is not None,
        "weights": weights is not None,
    }  # fmt: skip
    table = _exchange(group, facts)
    checks.alike_on_every_rank(_OP, table)
    sizes = [int(row["rows"]) for row in table]
    both_ids = None if ids is None else torch.stack([x.to(torch.int64) for x in ids], 1)
    return _GroupInfoNce.apply(image, text, logit_scale, logit_bias, both_ids, weights, group, sizes, options)
