"""Batched image augmentation on tensors: one grid_sample and one 3x3 colour matrix per image, about 2% of a step."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from limber_fast.training.config import AugmentConfig

_LUMA = (0.299, 0.587, 0.114)


class Augment:
    """Random affine map, elastic warp and colour change of drawings on white.

    Works on ink, 1 - x: the white ground is 0 there, so zero padding continues it and colour matrices leave it white.

    Args (call): images: [B, 3, H, W] uint8; generator: the source of every random number.
    Returns: [B, 3, H, W] fp32 in [0, 1].
    """

    def __init__(self, config: AugmentConfig):
        self.config = config

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        ink = images.to(torch.float32).div_(-255).add_(1)
        ink = F.grid_sample(ink, self._grid(ink.shape, generator), mode="bilinear", align_corners=False)
        batch, channels, height, width = ink.shape
        coloured = torch.bmm(self._colour(batch, generator), ink.view(batch, channels, height * width))
        return coloured.neg_().add_(1).clamp_(0, 1).view(batch, channels, height, width)

    def _uniform(self, batch: int, low: float, high: float, generator: torch.Generator) -> Tensor:
        return torch.empty(batch).uniform_(low, high, generator=generator)

    def _coin(self, batch: int, rate: float, generator: torch.Generator) -> Tensor:
        return torch.rand(batch, generator=generator) < rate

    def _grid(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Where each output pixel reads: [B, H, W, 2] in [-1, 1]."""
        c, batch = self.config, shape[0]
        scale = self._uniform(batch, math.log(c.scale_low), math.log(c.scale_high), generator).exp()
        stretch = self._uniform(batch, -c.aspect, c.aspect, generator).exp().sqrt()
        turn = self._uniform(batch, -c.rotation_degrees, c.rotation_degrees, generator).deg2rad()
        mirror = 1 - 2 * self._coin(batch, c.flip, generator).float()
        cos, sin = turn.cos() / scale, turn.sin() / scale
        shift = self._uniform(2 * batch, -2 * c.shift, 2 * c.shift, generator).view(2, batch)
        top = torch.stack([mirror * cos * stretch, -mirror * sin * stretch, shift[0]], -1)
        bottom = torch.stack([sin / stretch, cos / stretch, shift[1]], -1)
        grid = F.affine_grid(torch.stack([top, bottom], 1), list(shape), align_corners=False)
        if c.elastic:
            bends = torch.randn(batch, 2, 4, 4, generator=generator).mul_(2 * c.elastic)
            grid += F.interpolate(bends, shape[2:], mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
        return grid

    def _colour(self, batch: int, generator: torch.Generator) -> Tensor:
        """Hue rotation about the grey axis, saturation, grey, channel gain: [B, 3, 3]."""
        c = self.config
        turn = self._uniform(batch, -c.hue_degrees, c.hue_degrees, generator).deg2rad()
        turn = (turn * self._coin(batch, c.hue, generator)).view(batch, 1, 1)
        eye, third = torch.eye(3), torch.full((3, 3), 1 / 3)
        skew = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
        hue = third + turn.cos() * (eye - third) + turn.sin() * skew
        amount = self._uniform(batch, c.saturation_low, c.saturation_high, generator)
        amount = (amount * ~self._coin(batch, c.gray, generator)).view(batch, 1, 1)
        saturation = amount * eye + (1 - amount) * torch.tensor(_LUMA).expand(3, 3)
        gain = self._uniform(3 * batch, 1 - c.channel_gain, 1 + c.channel_gain, generator).view(batch, 3, 1)
        return gain * torch.bmm(saturation, hue)
