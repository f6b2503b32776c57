"""An `EmojiDataset` as tensors: 32-pixel drawings are small enough to train on straight from memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from limber_fast.data.emoji import EmojiDataset


@dataclass(frozen=True)
class Drawings:
    """images: [N, 3, H, W] uint8, concept: [N] int64 index into `emoji.concepts()`."""

    images: Tensor
    concept: Tensor

    @classmethod
    def of(cls, dataset: EmojiDataset) -> Drawings:
        images = torch.tensor(dataset.images).permute(0, 3, 1, 2).contiguous()
        return cls(images, torch.tensor(dataset.concept))

    def __len__(self) -> int:
        return len(self.concept)

    def __getitem__(self, rows: Tensor) -> Drawings:
        return Drawings(self.images[rows], self.concept[rows])

    def shuffled_rows(self, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Rows of one batch after another, for ever; every drawing once an epoch but for its last, short batch."""
        order = torch.empty(0, dtype=torch.int64)
        while True:
            if len(order) < batch:
                order = torch.randperm(len(self), generator=generator)
            yield order[:batch]
            order = order[batch:]
