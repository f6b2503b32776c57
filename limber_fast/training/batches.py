"""Concept-balanced batches: each concept once, drawn in different styles, each drawing with a caption of its own."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from limber_fast.data.emoji import Concept
from limber_fast.models.tokenizer import WordTokenizer
from limber_fast.training.augment import Augment
from limber_fast.training.captions import CaptionSampler
from limber_fast.training.config import TrainConfig


@dataclass(frozen=True)
class Draw:
    """What is drawn for a step. Ordered view by view: row v * C + c is view v of the batch's concept c.

    rows: [V * C] int64 drawings, tokens: [V * C, context] int64, ids: [V * C] int64 concept of each row, and a
    generator for what is done to the images.
    """

    rows: Tensor
    tokens: Tensor
    ids: Tensor
    generator: torch.Generator


@dataclass(frozen=True)
class Batch:
    """images: [V * C, 3, H, W] fp32 or features [V * C, D] fp32, tokens and ids as drawn."""

    images: Tensor
    tokens: Tensor
    ids: Tensor


class ConceptBatches:
    """batch(step) is a function of (seed, step) alone, so a resumed run goes on with the batches it would have had.

    Args:
        images: [R, 3, H, W] uint8, the training drawings.
        concept_of: [R], index into `concepts` of each drawing.
        concepts: the metadata the captions are drawn from.
    """

    def __init__(self, images: Tensor, concept_of: Sequence[int], concepts: Sequence[Concept], tokenizer: WordTokenizer,
                 config: TrainConfig):  # fmt: skip
        self.images, self.concepts, self.tokenizer, self.config = images, concepts, tokenizer, config
        self.concept_of, self.rows_of = concept_of, {}
        for row, concept in enumerate(concept_of):
            self.rows_of.setdefault(int(concept), []).append(row)
        self.drawn = sorted(self.rows_of)
        if len(self.drawn) < config.concepts_per_batch:
            raise ValueError(
                f"ConceptBatches: {len(self.drawn)} concepts cannot fill a batch of {config.concepts_per_batch}"
            )
        self._augment, self._caption = Augment(config.augment), CaptionSampler(config.captions)
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        """Batches per epoch (each concept once; the rest of a permutation is dropped)."""
        return len(self.drawn) // self.config.concepts_per_batch

    def __call__(self, step: int) -> Batch:
        drawn = self.draw(step)
        return Batch(self._augment(self.images[drawn.rows], drawn.generator), drawn.tokens, drawn.ids)

    def draw(self, step: int) -> Draw:
        """Concepts, a style and a caption for each view of them."""
        rng = random.Random(f"{self.config.seed} {step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        chosen = self._chosen(step)
        views = [self._styles(concept, rng) for concept in chosen]
        rows = [view[v] for v in range(self.config.images_per_concept) for view in views]
        captions = [self._caption(self.concepts[c], rng) for _ in range(self.config.images_per_concept) for c in chosen]
        ids = torch.tensor(chosen * self.config.images_per_concept)
        return Draw(torch.tensor(rows), self.tokenizer(captions), ids, generator)

    def _chosen(self, step: int) -> list[int]:
        epoch, place = divmod(step, len(self))
        if self._order[0] != epoch:
            order = list(self.drawn)
            random.Random(f"{self.config.seed} epoch {epoch}").shuffle(order)
            self._order = (epoch, order)
        size = self.config.concepts_per_batch
        return self._order[1][place * size : (place + 1) * size]

    def _styles(self, concept: int, rng: random.Random) -> list[int]:
        """Different styles while there are enough; a concept drawn once repeats, augmented anew."""
        rows, want = self.rows_of[concept], self.config.images_per_concept
        return rng.sample(rows, want) if len(rows) >= want else [rng.choice(rows) for _ in range(want)]
