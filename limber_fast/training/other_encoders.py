"""The demo's other encoders: the CLIP's image tower trained without captions, on labels or on pixels alone."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limber_fast.data.emoji import concepts
from limber_fast.models.clip import SmallClipConfig, SmallResNet
from limber_fast.training.augment import Augment
from limber_fast.training.config import TrainConfig
from limber_fast.training.drawings import Drawings
from limber_fast.training.ema import WeightAverage
from limber_fast.training.interrupt import InterruptGuard
from limber_fast.training.precision import autocast
from limber_fast.training.schedule import TimeBudget, warmup_cosine
from limber_fast.training.trainer import build_optimizers

LABELS, PIXELS = "labels", "pixels"
PATCH, HIDDEN = 4, 0.5
Watch = Callable[[float, float], None]


def subgroups() -> list[str]:
    """The labels, in Unicode's order."""
    return list(dict.fromkeys(concept.subgroup for concept in concepts()))


def new_encoder(kind: str) -> SmallResNet:
    """The CLIP's image tower with another last map: to the subgroups' logits, or to the pixels of a drawing."""
    side = SmallClipConfig.image_size
    outputs = {LABELS: len(subgroups()), PIXELS: 3 * side * side}[kind]
    return SmallResNet(outputs, side, SmallClipConfig.image_width).to(memory_format=torch.channels_last)


def _label_loss(visual: SmallResNet, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    return F.cross_entropy(visual(images).float(), labels, label_smoothing=0.1)


def _pixel_loss(visual: SmallResNet, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Mean squared error of the hidden patches' pixels (as BEIT and MAE learn: of a picture's own parts)."""
    side = images.shape[2] // PATCH
    hidden = torch.rand(len(images), 1, side, side, generator=generator) < HIDDEN
    hidden = hidden.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    found = visual(images.masked_fill(hidden, 0.5)).float().view_as(images)
    return ((found - images).square() * hidden).sum() / (3 * hidden.sum())


def train_encoder(
    kind: str, drawings: Drawings, config: TrainConfig, *, clock: Callable[[], float] = time.perf_counter,
    watch: Watch = lambda fraction, loss: None,
) -> SmallResNet:  # fmt: skip
    """The tower trained as the CLIP's is: as long, with the same optimiser, batch, augmentation and average.

    Args:
        kind: `LABELS`, softmax over the concepts' subgroups (as NF-ResNet50 learned ImageNet's classes), or `PIXELS`,
            half of a drawing from the other half (as BEIT).
        config: minutes, steps, seed, batch, learning rates and augmentation are used.
    Returns: the averaged tower in evaluation mode.
    Raises: KeyboardInterrupt after the step in which Ctrl-C came.
    """
    torch.manual_seed(config.seed)
    model = nn.ModuleDict({"visual": new_encoder(kind)}).train()
    visual, generator = model["visual"], torch.Generator().manual_seed(config.seed)
    names, known, augment = subgroups(), concepts(), Augment(config.augment)
    labels = torch.tensor([names.index(known[i].subgroup) for i in drawings.concept.tolist()])
    loss_of = {LABELS: _label_loss, PIXELS: _pixel_loss}[kind]
    optimizers, average = build_optimizers(model, config), WeightAverage(model, config.ema)
    batch = min(config.concepts_per_batch * config.images_per_concept, len(drawings))
    budget, step, mean = TimeBudget(60 * config.minutes, clock=clock), 0, None
    batches = drawings.shuffled_rows(batch, generator)
    with InterruptGuard() as guard:
        budget.start()
        while (fraction := step / config.steps if config.steps else budget.fraction) < 1:
            rows = next(batches)
            images = augment(drawings.images[rows], generator)
            with autocast():
                loss = loss_of(visual, images, labels[rows], generator)
            model.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            factor = warmup_cosine(fraction, config.warmup)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = factor * optimizer.defaults["lr"]
                optimizer.step()
            step += 1
            average.update(model, step)
            mean = loss.item() if mean is None else 0.95 * mean + 0.05 * loss.item()
            watch(fraction, mean)
            if guard.requested:
                raise KeyboardInterrupt
    average.copy_to(model)
    return visual.eval().requires_grad_(False)
