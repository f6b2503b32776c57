"""CLIP and SigLIP losses with the constructor and forward signatures of open_clip, computed by `info_nce`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from limber_fast import checks, dispatch
from limber_fast.ops.info_nce import info_nce


class _Loss(nn.Module):
    variant: str

    def __init__(self, distributed: dict[str, tuple[Any, Any]], cache_mb: float, backend: str) -> None:
        super().__init__()
        given = {name: value for name, (value, single) in distributed.items() if value != single}
        checks.single_process(type(self).__name__, given)
        checks.not_negative(type(self).__name__, "cache_mb", cache_mb)
        checks.choice(type(self).__name__, "backend", backend, dispatch.CHOICES)
        self.cache_mb, self.backend = cache_mb, backend

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Loss of image_features: [N, D] and text_features: [N, D]; {'contrastive_loss': loss} if output_dict."""
        loss = info_nce(
            image_features,
            text_features,
            logit_scale,
            logit_bias=logit_bias,
            variant=self.variant,
            cache_mb=self.cache_mb,
            backend=self.backend,
        )
        return {"contrastive_loss": loss} if output_dict else loss

    def extra_repr(self) -> str:
        return f"cache_mb={self.cache_mb}, backend={self.backend!r}"


class ClipLoss(_Loss):
    """Symmetric softmax loss of CLIP, a drop-in for `open_clip.loss.ClipLoss` in one process.

    Args:
        local_loss, gather_with_grad, cache_labels: accepted; without effect in one process.
        rank, world_size, use_horovod: must describe one process.
        cache_mb, backend: as in `limber_fast.info_nce`.

    Raises: ValueError for a distributed setting or an unknown backend.
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
        cache_mb: float = 256,
        backend: str = "auto",
    ) -> None:
        distributed = {"rank": (rank, 0), "world_size": (world_size, 1), "use_horovod": (use_horovod, False)}
        super().__init__(distributed, cache_mb, backend)


class SigLipLoss(_Loss):
    """Pairwise sigmoid loss of SigLIP, a drop-in for `open_clip.loss.SigLipLoss` in one process.

    Args:
        cache_labels, dist_impl: accepted; without effect in one process.
        rank, world_size: must describe one process.
        cache_mb, backend: as in `limber_fast.info_nce`.

    Raises: ValueError for a distributed setting or an unknown backend.
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
        cache_mb: float = 256,
        backend: str = "auto",
    ) -> None:
        super().__init__({"rank": (rank, 0), "world_size": (world_size, 1)}, cache_mb, backend)
