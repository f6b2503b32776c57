"""Fitting the demo's LiMBeR projection: features of drawings once, then naming through the frozen language model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

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
TUNED_RATE = 0.04  # of the map's learning rate, for the tower
Watch = Callable[[float, float], None]


def soft_tokens(ids: Sequence[int]) -> list[int]:
    """A name's tokens, as many as there are soft prompts, beginning anew behind the last."""
    return list(islice(cycle(ids), SOFT_PROMPTS))


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


@torch.no_grad()
def least_squares(limber: Limber, features: Tensor, drawings: Drawings, penalty: float = 0.03) -> None:
    """Where P starts: soft prompt j is the ridge regression of the embedding of token j of a drawing's name, whose
    tokens begin anew behind the last. Of the language model it takes the embeddings alone.

    min sum |P_j x + b - wte[token_j]|^2 + penalty * N * |P_j|^2 over N drawings, for every j in closed form.
    """
    model, known = limber.language_model, concepts()
    embeddings = model.embed(torch.arange(model.config.vocab_size, device=model.device)).float()
    ids = {i: limber.tokenizer(f" {known[i].name}").input_ids for i in set(drawings.concept.tolist())}
    wanted = embeddings[torch.tensor([soft_tokens(ids[i]) for i in drawings.concept.tolist()])]  # [N, k, E]
    bias = wanted.mean((0, 1))  # the prompts share one b
    n, width = features.shape
    gram = features.T @ features + penalty * n * torch.eye(width)
    maps = torch.linalg.solve(gram, features.T @ (wanted - bias).flatten(1))  # [D, k * E]
    maps = maps.view(width, SOFT_PROMPTS, -1).permute(2, 1, 0)
    limber.projection.weight.copy_(maps.flatten(1))
    limber.projection.bias.copy_(bias)


def fit_projection(
    limber: Limber, features: Tensor, drawings: Drawings, seconds: float, *, seed: int = 0, batch: int = 64,
    learning_rate: float = 1e-3, weight_decay: float = 0.1, noise: float = 0.6, tuned: SmallResNet | None = None,
    standard: Standardise | None = None, clock: Callable[[], float] = time.perf_counter,
    watch: Watch = lambda fraction, loss: None,
) -> int:  # fmt: skip
    """P and b from `least_squares`, then AdamW on them alone for a time: cross entropy of the name behind 'A picture
    of'; every other parameter is frozen.

    Args:
        features: [N, D] standardised, of `drawings`. noise: standard deviation of what is added to them in every step,
            in the place of augmented drawings, which would have to be encoded anew.
        tuned: the tower, where it is to be trained with P, at `TUNED_RATE` of its learning rate and with its batch
            statistics as they are; `standard` is then what standardises its features.
    Returns: steps taken.
    Raises: KeyboardInterrupt after the step in which Ctrl-C came.
    """
    captions = [limber.tokenizer(f" {concept.name}").input_ids for concept in concepts()]
    generator = torch.Generator().manual_seed(seed)
    least_squares(limber, features, drawings)
    groups = [{"params": list(limber.projection.parameters()), "rate": learning_rate}]
    if tuned is not None:
        groups.append({"params": list(tuned.requires_grad_().parameters()), "rate": TUNED_RATE * learning_rate})
    optimizer = torch.optim.AdamW(groups, learning_rate, (0.9, 0.95), weight_decay=weight_decay)
    budget, step, mean = TimeBudget(seconds, clock=clock), 0, None
    batches = drawings.shuffled_rows(batch, generator)
    limber.train()
    with InterruptGuard() as guard:
        budget.start()
        while (fraction := budget.fraction) < 1:
            rows = next(batches)
            if tuned is None:
                drawn = features[rows]
            else:
                drawn = standard(tuned.grid(drawings.images[rows].float() / 255).flatten(1))
            drawn = drawn + noise * torch.randn(drawn.shape, generator=generator)
            named = [captions[i] for i in drawings.concept[rows].tolist()]
            loss = limber(spread(drawn), named, prompt=PROMPT, seed=seed + step)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * warmup_cosine(fraction, 0.08)
            optimizer.step()
            mean = loss.item() if mean is None else 0.95 * mean + 0.05 * loss.item()
            watch(fraction, mean)
            step += 1
            if guard.requested:
                raise KeyboardInterrupt
    limber.eval()
    return step
