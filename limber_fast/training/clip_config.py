"""Every setting of `limber-fast train-clip`, checked once."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from limber_fast import checks, dispatch
from limber_fast.training.limber_config import settle_kinds

_OP = "train-clip"
# What may change between a checkpoint and the run that goes on from it: nothing of these reaches a weight.
FREE = ("output", "workers", "save_every", "tensorboard")


@dataclass(frozen=True)
class ClipTrainConfig:
    """open_clip's usual values by default; every field is a flag of `limber-fast train-clip`.

    Attributes:
        model: a name of `open_clip.list_models()`, or the .json file of such a model's configuration.
        data: 'emoji', or a folder in LiMBeR's layout (images/<n>/*.jpg, image_data/<n>/*.json), or a captions file of
            COCO (.json), whose pictures are in the folder `images`, or WebDataset shards, as 'cc3m-{00000..00331}.tar'.
        output: folder for the checkpoint, the log and the weights; to resume, processes on several machines share it or
            have copies of the checkpoint.
        loss: 'clip' (softmax) or 'siglip' (sigmoid, with a learnable bias).
        steps, batch_size: optimiser steps, and pairs in each, over all processes.
        micro_batch: pairs in one forward pass of one process; 0: all of its share. Loss and gradients are those of the
            whole batch: passes are made twice, and keep their activations one at a time. (Batch normalisation takes
            its statistics from a pass.)
        learning_rate, warmup, beta1, beta2, eps, weight_decay, grad_clip: AdamW; the rate rises over `warmup` steps and
            falls to 0 at `steps` as half a cosine. Gains, biases and the scale do not decay. grad_clip 0: none.
        label_smoothing: of the softmax loss.
        precision: 'bf16' (autocast) or 'fp32'.
        grad_checkpointing: recompute activations in the backward pass.
        workers: processes that read pictures; 0 reads in the training process.
        save_every: steps between checkpoints. seed: of the weights, the order, augmentation and captions.
        backend: of the loss, as in `limber_fast.info_nce`.
        tensorboard: also log there.

    Raises: TypeError or ValueError naming the field and what it must be.
    """

    model: str = "ViT-B-32"
    data: str = "emoji"
    images: str = ""
    output: str = "limber_fast_clip"
    loss: str = "clip"
    steps: int = 10_000
    batch_size: int = 256
    micro_batch: int = 0
    learning_rate: float = 5e-4
    warmup: int = 500
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    weight_decay: float = 0.2
    grad_clip: float = 1.0
    label_smoothing: float = 0.0
    precision: str = "bf16"
    grad_checkpointing: bool = False
    workers: int = 0
    save_every: int = 500
    seed: int = 0
    backend: str = "auto"
    tensorboard: bool = False

    def __post_init__(self) -> None:
        settle_kinds(_OP, self)
        for name in ("steps", "batch_size", "save_every"):
            if getattr(self, name) < 1:
                raise checks.invalid(_OP, name, "be at least 1", repr(getattr(self, name)))
        for name in ("learning_rate", "warmup", "eps", "weight_decay", "grad_clip", "workers", "micro_batch"):
            checks.not_negative(_OP, name, getattr(self, name))
        checks.seed(_OP, "seed", self.seed)
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise checks.invalid(_OP, name, "lie in [0, 1)", repr(getattr(self, name)))
        if self.warmup >= self.steps:
            raise checks.invalid(_OP, "warmup", f"be less than steps = {self.steps}", repr(self.warmup))
        for name in ("model", "data", "output"):
            if not getattr(self, name):
                raise checks.invalid(_OP, name, "be given", "''")
        checks.choice(_OP, "loss", self.loss, ("clip", "siglip"))
        checks.choice(_OP, "precision", self.precision, ("bf16", "fp32"))
        checks.choice(_OP, "backend", self.backend, dispatch.CHOICES)
        checks.label_smoothing(_OP, self.label_smoothing, "softmax" if self.loss == "clip" else "sigmoid")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
