"""CLIP and SigLIP losses with the constructor and forward signatures of open_clip, computed by `info_nce`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from limber_fast import checks, dispatch
from limber_fast.ops.info_nce import info_nce


class _Loss(nn.Module):
    variant: str

    def __init__(
        self, world_size: int, rank: int, use_horovod: bool, group: Any, label_smoothing: float, cache_mb: float,
        backend: str,
    ) -> None:  # fmt: skip
        super().__init__()
        name = type(self).__name__
        checks.label_smoothing(name, label_smoothing, self.variant)
        checks.not_negative(name, "cache_mb", cache_mb)
        checks.choice(name, "backend", backend, dispatch.CHOICES)
        self.group = checks.loss_group(name, world_size, rank, use_horovod, group)
        self.label_smoothing, self.cache_mb, self.backend = label_smoothing, cache_mb, backend

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
        *,
        ids: Tensor | tuple[Tensor, Tensor] | None = None,
        weights: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Loss of image_features: [N, D] and text_features: [N, D]; {'contrastive_loss': loss} if output_dict.

        Over a group, N rows of this rank's own. ids: [N] integers; rows of equal ids, on whatever ranks, are never each
        other's negatives. weights: [N], one per pair; softmax alone over a group.
        """
        loss = info_nce(
            image_features,
            text_features,
            logit_scale,
            logit_bias=logit_bias,
            ids=ids,
            weights=weights,
            label_smoothing=self.label_smoothing,
            variant=self.variant,
            cache_mb=self.cache_mb,
            backend=self.backend,
            group=self.group,
        )
        return {"contrastive_loss": loss} if output_dict else loss

    def extra_repr(self) -> str:
        words = f"cache_mb={self.cache_mb}, backend={self.backend!r}"
        return words if self.group is None else f"{words}, world_size={self.group.size()}"


class ClipLoss(_Loss):
    """Symmetric softmax loss of CLIP, a drop-in for `open_clip.loss.ClipLoss` in one process or many.

    Over a group of processes every rank gets the loss of the global batch, however many rows each rank has, and the
    gradients of open_clip's `gather_with_grad=True`: `logit_scale` those of one process, towers group size x those of
    one process, so that DDP's average over ranks is the gradient of one process. `info_nce`'s docstring says more.

    Args:
        local_loss, gather_with_grad, cache_labels: accepted and without effect: nothing of N x N is ever held, and a
            gradient that stops at the ranks' borders is not offered.
        rank, world_size: of the default process group, which world_size > 1 or `group` brings into play.
        use_horovod: must be False.
        group: a torch.distributed process group, for a global batch of some ranks only; default all `world_size`.
        label_smoothing, cache_mb, backend: as in `limber_fast.info_nce`.

    Raises: ValueError for rank and world_size other than the group's, a group of other processes, an unknown backend;
        on all ranks of the group where one rank's arguments are wrong or do not match the others'.
    Source: Radford et al., arXiv 2103.00020, figure 3.
    """

    variant = "softmax"

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        group: Any = None,
        label_smoothing: float = 0.0,
        cache_mb: float = 256,
        backend: str = "auto",
    ) -> None:
        super().__init__(world_size, rank, use_horovod, group, label_smoothing, cache_mb, backend)


class SigLipLoss(_Loss):
    """Pairwise sigmoid loss of SigLIP, a drop-in for `open_clip.loss.SigLipLoss` in one process or many.

    Over a group of processes as `ClipLoss`: the loss of the global batch on every rank (open_clip returns each rank's
    share of it; their average is the same), the gradients of open_clip's.

    Args:
        cache_labels, dist_impl: accepted and without effect; open_clip's ways of exchange compute one result.
        rank, world_size, group, cache_mb, backend: as for `ClipLoss`.

    Raises: as `ClipLoss`.
    Source: Zhai et al., arXiv 2303.15343, algorithm 1.
    """

    variant = "sigmoid"

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        *,
        group: Any = None,
        cache_mb: float = 256,
        backend: str = "auto",
    ) -> None:
        super().__init__(world_size, rank, False, group, 0.0, cache_mb, backend)
