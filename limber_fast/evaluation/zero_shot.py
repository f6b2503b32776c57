"""Zero-shot classification as in CLIP: a class is the mean of its prompts' features (arXiv 2103.00020, 3.1.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from open_clip.zero_shot_classifier import build_zero_shot_classifier
from torch import Tensor

from limber_fast.data.emoji import Concept
from limber_fast.models.clip import SmallClip
from limber_fast.models.tokenizer import WordTokenizer, split_words

# No templates: they cost accuracy, as the word head never heard of their words (SETTINGS.md).
NAME_PROMPTS = [lambda concept: concept.name]
_MOST_TEXTS = 13


def text_prompts(tokenizer: WordTokenizer, *, subgroup: bool = False) -> list:
    """The name, each tag and on demand the subgroup, a prompt each, without words that no training caption held.

    Every class has the same number of prompts: few texts take turns.
    """

    def text(concept: Concept, turn: int) -> str:
        texts = (concept.name, *concept.tags, *([concept.subgroup] if subgroup else []))
        known = [" ".join(filter(tokenizer.known, split_words(text))) for text in texts]
        known = list(dict.fromkeys(filter(None, known))) or [concept.name]
        return known[turn % len(known)]

    return [lambda concept, turn=turn: text(concept, turn) for turn in range(_MOST_TEXTS)]


def class_features(model: SmallClip, tokenizer: WordTokenizer, classes: Sequence[Concept], prompts: list) -> Tensor:
    """Each prompt's features normalised, their mean, normalised again (open_clip's own function).

    Returns: [D, C] fp32.
    """
    return build_zero_shot_classifier(model, tokenizer, classes, prompts, num_classes_per_batch=256)


@torch.no_grad()
def image_features(model: SmallClip, images: Tensor, batch: int = 512) -> Tensor:
    """Normalised image features of [N, 3, H, W] uint8 images: [N, D] fp32."""
    parts = [model.encode_image(part.float() / 255, normalize=True) for part in images.split(batch)]
    return torch.cat(parts)


def similarities(features: Tensor, classes: Tensor) -> Tensor:
    """Cosine similarity of images [N, D] and classes [D, C]."""
    return features @ classes
