"""Zero-shot classification as in CLIP: a class is the mean of its prompts' features (arXiv 2103.00020, 3.1.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from open_clip.zero_shot_classifier import build_zero_shot_classifier
from torch import Tensor

from limber_fast.data.emoji import Concept
from limber_fast.models.clip import SmallClip
from limber_fast.models.tokenizer import WordTokenizer, split_words
from limber_fast.training.captions import TEMPLATES

NAME_PROMPTS = [lambda concept, template=template: template.format(concept.name) for template in TEMPLATES]
_MOST_TAGS = 12


def name_and_tag_prompts(tokenizer: WordTokenizer) -> list:
    """The name and each tag in every template, a prompt each; words that no training caption held are left out.

    Every class has the same number of prompts: few tags take turns.
    """

    def words(concept: Concept, turn: int) -> str:
        texts = [" ".join(filter(tokenizer.known, split_words(text))) for text in (concept.name, *concept.tags)]
        known = list(dict.fromkeys(filter(None, texts))) or [concept.name]
        return known[turn % len(known)]

    turns = range(1 + _MOST_TAGS)
    return [lambda concept, t=t, turn=turn: t.format(words(concept, turn)) for t in TEMPLATES for turn in turns]


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
