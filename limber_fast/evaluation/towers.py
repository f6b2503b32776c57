"""Image and text features by name: models of open_clip and timm, and the CLIP of `limber-fast demo`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limber_fast import checks
from limber_fast.data.pictures import Skipped
from limber_fast.devices import device_of
from limber_fast.models.encoders import open_clip_model, small_pixels, timm_model

_OP = "evaluate"


@dataclass
class Towers:
    """What classification needs of a model.

    Attributes:
        model: with `encode_text(ids, normalize)` where `tokenize` is not None.
        image_features: preprocessed [n, 3, H, W] -> [n, D], not normalised.
        preprocess: PIL image -> [3, H, W].
        tokenize: texts -> ids; None where there is no text tower.
        templates: that class names are put in, each with one {}.
    """

    model: nn.Module
    image_features: Callable[[Tensor], Tensor]
    preprocess: Callable[[Any], Tensor]
    tokenize: Callable[[Sequence[str]], Tensor] | None = None
    templates: Sequence[str] = ()


def towers(name: str, weights: str | bool | None = True, device: str | None = None) -> Towers:
    """A model by name, in evaluation mode.

    Args:
        name: 'open_clip:MODEL', 'timm:MODEL' (features before its classifier) or 'demo:CHECKPOINT'.
        weights: as of `limber_fast.models.encoders.encoder`.
        device: 'cpu' or 'cuda'; by default a GPU where there is one.
    """
    place = device_of(_OP, device)
    kind, _, model = name.partition(":")
    if kind not in ("open_clip", "timm", "demo") or not model:
        raise checks.invalid(_OP, "model", "be open_clip:MODEL, timm:MODEL or demo:CHECKPOINT", repr(name))
    weights = weights or None
    found = {"open_clip": _open_clip, "timm": _timm, "demo": _demo}[kind](name, model, weights)
    found.model.eval().requires_grad_(False).to(place)
    if (tokenize := found.tokenize) is not None:
        found.tokenize = lambda texts: tokenize(texts).to(place)
    return found


def _open_clip(name: str, model: str, weights: Any) -> Towers:
    import open_clip

    found, preprocess = open_clip_model(name, model, weights)
    templates = [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    return Towers(found, found.encode_image, preprocess, open_clip.get_tokenizer(model), templates)


def _timm(name: str, model: str, weights: Any) -> Towers:
    found, preprocess, _ = timm_model(name, model, weights)
    return Towers(found, found, preprocess)


def _demo(name: str, checkpoint: str, weights: Any) -> Towers:
    from limber_fast.demo import load_model
    from limber_fast.training.captions import TEMPLATES

    if weights is not True:
        raise checks.invalid(_OP, "weights", "be left to demo:CHECKPOINT", repr(weights))
    model, tokenizer = load_model(Path(checkpoint))
    return Towers(model, model.encode_image, small_pixels, tokenizer, TEMPLATES)


@torch.no_grad()
def encode_images(
    found: Towers, records: Sequence[Any], skipped: Skipped, *, batch: int = 64,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[Tensor, list[Any]]:  # fmt: skip
    """Features [n, D] fp32 of all images that can be opened, and their records; the others are in `skipped`."""
    device = next(found.model.parameters()).device
    features, kept = [], []
    for some in _batches(skipped.open(records), batch):
        pixels = torch.stack([found.preprocess(image) for image, _ in some])
        features.append(found.image_features(pixels.to(device)).float().cpu())
        kept += [record for _, record in some]
        progress(len(kept) + len(skipped))
    if not kept:
        raise checks.invalid(_OP, "the images", "hold one that can be opened", str(skipped))
    return torch.cat(features), kept


def _batches(things: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while some := list(islice(things, size)):
        yield some
