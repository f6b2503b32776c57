"""Fitting the demo's LiMBeR projection: features of drawings once, then naming through the frozen language model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from limber_fast.data.emoji import concepts
from limber_fast.models.clip import SmallResNet
from limber_fast.models.limber import Limber
from limber_fast.training.drawings import Drawings
from limber_fast.training.interrupt import InterruptGuard
from limber_fast.training.schedule import TimeBudget, warmup_cosine

PROMPT = "A picture of"
SOFT_PROMPTS = 4
Watch = Callable[[float, float], None]


@dataclass(frozen=True)
class Standardise:
    """(features - mean) / deviation of the training drawings: a part of the linear map, that it need not learn."""

    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Standardise:
        return cls(features.mean(0), features.std(0).clamp(min=1e-4 * float(features.std())))

    def __call__(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.deviation


@torch.no_grad()
def grid_features(visual: SmallResNet, images: Tensor, batch: int = 512) -> Tensor:
    """The 2 x 2 map of [N, 3, 32, 32] uint8 drawings, flattened: [N, 4 * channels] fp32."""
    visual.eval()
    return torch.cat([visual.grid(part.float() / 255).flatten(1) for part in images.split(batch)])


def spread(features: Tensor, k: int = SOFT_PROMPTS) -> Tensor:
    """[N, D] -> [N, k, k D], block by block: every soft prompt has its own part of P and sees the whole drawing."""
    n, width = features.shape
    blocks = features.new_zeros(n, k, k, width)
    blocks[:, torch.arange(k), torch.arange(k)] = features[:, None]
    return blocks.view(n, k, k * width)


def fit_projection(
    limber: Limber, features: Tensor, drawings: Drawings, seconds: float, *, seed: int = 0, batch: int = 64,
    learning_rate: float = 2e-3, weight_decay: float = 0.1, noise: float = 0.6,
    clock: Callable[[], float] = time.perf_counter, watch: Watch = lambda fraction, loss: None,
) -> int:  # fmt: skip
    """AdamW on P and b alone for a time: cross entropy of 'A picture of <name>'; every other parameter is frozen.

    Args:
        features: [N, D] standardised, of `drawings`. noise: standard deviation of what is added to them in every step,
            in the place of augmented drawings, which would have to be encoded anew.
    Returns: steps taken.
    Raises: KeyboardInterrupt after the step in which Ctrl-C came.
    """
    names = [concept.name for concept in concepts()]
    generator = torch.Generator().manual_seed(seed)
    nn.init.normal_(limber.projection.weight, 0, 0.02 / features.shape[1] ** 0.5, generator=generator)
    nn.init.zeros_(limber.projection.bias)
    optimizer = torch.optim.AdamW(limber.projection.parameters(), learning_rate, (0.9, 0.95), weight_decay=weight_decay)
    budget, step, order, mean = TimeBudget(seconds, clock=clock), 0, torch.empty(0, dtype=torch.int64), None
    limber.train()
    with InterruptGuard() as guard:
        budget.start()
        while (fraction := budget.fraction) < 1:
            if len(order) < batch:
                order = torch.randperm(len(drawings), generator=generator)
            rows, order = order[:batch], order[batch:]
            drawn = features[rows] + noise * torch.randn(len(rows), features.shape[1], generator=generator)
            captions = [f"{PROMPT} {names[i]}" for i in drawings.concept[rows].tolist()]
            loss = limber(spread(drawn), captions, seed=seed + step)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(limber.projection.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * warmup_cosine(fraction, 0.08)
            optimizer.step()
            mean = loss.item() if mean is None else 0.95 * mean + 0.05 * loss.item()
            watch(fraction, mean)
            step += 1
            if guard.requested:
                raise KeyboardInterrupt
    limber.eval()
    return step
