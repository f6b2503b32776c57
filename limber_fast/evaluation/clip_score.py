"""CLIPScore and RefCLIPScore, from features or through a scorer of images and texts (arXiv 2104.08718, section 3).

Score with another model than the captioner's own encoder: that one flatters what it conditioned on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from limber_fast import checks

WEIGHT = 2.5
PREFIX = "A photo depicts "


class Scorer(Protocol):
    """What embeds images and texts in one space: any CLIP. Features need no normalisation."""

    def encode_image(self, images: Any) -> Tensor: ...

    def encode_text(self, texts: Any) -> Tensor: ...


@dataclass(frozen=True)
class ClipScores:
    """Per image [N] fp64: `clip_score`, 0 to 2.5, and where there are references `ref_clip_score`."""

    clip_score: np.ndarray
    ref_clip_score: np.ndarray | None = None


def clip_score(image: Tensor, caption: Tensor) -> np.ndarray:
    """CLIPScore of each caption: 2.5 * max(cos(image, caption), 0).

    Args:
        image: [N, D] fp16|bf16|fp32|fp64, features of images. caption: [N, D], of their captions.
    Returns: [N] fp64.
    Raises: ValueError for features of other shapes, not finite, or with a row of zeros, which has no direction.
    """
    image, caption = _directions("clip_score", image=image, caption=caption)
    checks.as_long("clip_score", "caption", caption, "image", image)
    return (WEIGHT * (image * caption).sum(1).clamp(min=0)).numpy()


def ref_clip_score(image: Tensor, caption: Tensor, references: Tensor, owners: Sequence[int]) -> np.ndarray:
    """RefCLIPScore of each caption: harmonic mean of its CLIPScore and max(its largest cosine with a reference, 0).

    Args:
        image, caption: [N, D] as in `clip_score`.
        references: [R, D], features of all references, embedded with the captions' prefix.
        owners: [R], the image that each reference describes; every image has at least one.
    Returns: [N] fp64, 0 where one of the two is.
    """
    alone = clip_score(image, caption)
    caption, references = _directions("ref_clip_score", caption=caption, references=references)
    checks.as_long("ref_clip_score", "owners", owners, "references", references)
    owner = torch.as_tensor(owners, dtype=torch.int64)
    checks.every_row("ref_clip_score", "owners", owner, len(caption))
    cosines = (caption[owner] * references).sum(1)
    best = torch.zeros(len(caption), dtype=torch.float64).scatter_reduce(0, owner, cosines, "amax")  # zeros: max(., 0)
    total = alone + best.numpy()
    return np.divide(2 * alone * best.numpy(), total, out=np.zeros_like(total), where=total > 0)


def score_captions(
    scorer: Scorer,
    images: Iterable[Any],
    captions: Sequence[str],
    references: Sequence[Sequence[str]] | None = None,
    *,
    preprocess: Callable[[Any], Tensor] | None = None,
    tokenize: Callable[[list[str]], Any] | None = None,
    prefix: str = PREFIX,
    batch: int = 64,
) -> ClipScores:
    """CLIPScore, and with references RefCLIPScore, of captions of images, a batch at a time.

    Args:
        scorer: `encode_image` gets [b, 3, H, W], `encode_text` what `tokenize` returns. A module is called as it is,
            without gradients, on its own device: put it in eval mode.
        images: as many as captions, read once: tensors [3, H, W], or anything that `preprocess` makes one of.
        references: per caption at least one.
        tokenize: from a list of texts to the scorer's input (open_clip's tokenizer); None hands the texts over.
        prefix: stands before every caption and reference.
    """
    checks.texts("score_captions", "captions", captions)
    if references is not None:
        checks.text_sets("score_captions", "references", references, "captions", captions)
    checks.size("score_captions", "batch", batch)
    device = next((p.device for p in scorer.parameters()), None) if isinstance(scorer, torch.nn.Module) else None

    def image_features(part: Sequence[Any]) -> Tensor:
        pixels = torch.stack([image if preprocess is None else preprocess(image) for image in part])
        return scorer.encode_image(pixels.to(device))

    def text_features(part: Sequence[str]) -> Tensor:
        tokens = [prefix + text for text in part] if tokenize is None else tokenize([prefix + text for text in part])
        return scorer.encode_text(tokens.to(device) if isinstance(tokens, Tensor) else tokens)

    image = _encode(image_features, images, batch)
    checks.as_long("score_captions", "images", image, "captions", captions)
    caption = _encode(text_features, captions, batch)
    if references is None:
        return ClipScores(clip_score(image, caption))
    flat = _encode(text_features, [text for texts in references for text in texts], batch)
    owners = [row for row, texts in enumerate(references) for _ in texts]
    return ClipScores(clip_score(image, caption), ref_clip_score(image, caption, flat, owners))


@torch.no_grad()
def _encode(encode: Callable[[Sequence[Any]], Tensor], inputs: Iterable[Any], batch: int) -> Tensor:
    parts, waiting = [], []
    for entry in inputs:
        waiting.append(entry)
        if len(waiting) == batch:
            parts.append(encode(waiting).cpu())
            waiting = []
    if waiting:
        parts.append(encode(waiting).cpu())
    return torch.cat(parts) if parts else torch.zeros(0, 0)


def _directions(op: str, **features: Tensor) -> list[Tensor]:
    """Each of them normalised, in fp64 on the CPU."""
    found, width = [], None
    for name, x in features.items():
        checks.matrix(op, name, x, "[N, D]")
        width = x.shape[1] if width is None else width
        checks.features_of_width(op, name, x, width)
        x = x.detach().cpu().double()
        checks.directions(op, name, x)
        found.append(F.normalize(x, dim=1))
    return found
