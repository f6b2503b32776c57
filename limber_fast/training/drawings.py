"""An `EmojiDataset` as tensors: 32-pixel drawings are small enough to train on straight from memory."""

from __future__ import annotations

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
