"""Training texts against an image tower that is trained no more (LiT, arXiv 2111.07991)."""

from __future__ import annotations

from dataclasses import replace

import torch

from limber_fast.models.clip import SmallClip
from limber_fast.training.augment import Augment
from limber_fast.training.batches import Batch, ConceptBatches
from limber_fast.training.config import TrainConfig
from limber_fast.training.precision import autocast


class LockedBatches:
    """batch(step) with image features in the place of images: each drawing has `views` augmented versions.

    A step without an image tower takes a tenth of the time, so that the texts of eight languages, which a step
    of the whole model would meet too seldom, are met often.

    Args:
        model: in evaluation mode; its image tower is run over all drawings here, and never again.
    """

    @torch.no_grad()
    def __init__(self, model: SmallClip, batches: ConceptBatches, config: TrainConfig):
        concepts = min(config.locked_concepts, len(batches.drawn))
        self.batches = ConceptBatches(
            batches.images, batches.concept_of, batches.concepts, batches.tokenizer,
            replace(config, concepts_per_batch=concepts, captions=config.locked_captions),
        )  # fmt: skip
        augment, generator = Augment(config.augment), torch.Generator().manual_seed(config.seed)
        views = []
        for _ in range(config.locked_views):
            parts = (augment(part, generator) for part in batches.images.split(512))
            with autocast():
                views.append(torch.cat([model.encode_image(part).float() for part in parts]))
        self.features = torch.stack(views)  # [views, drawings, D]

    def __call__(self, step: int) -> Batch:
        drawn = self.batches.draw(step)
        views = torch.randint(len(self.features), drawn.rows.shape, generator=drawn.generator)
        return Batch(self.features[views, drawn.rows], drawn.tokens, drawn.ids)
