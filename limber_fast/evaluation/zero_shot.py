"""Zero-shot classification as in CLIP: a class is the mean of its prompts' features (arXiv 2103.00020, 3.1.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from limber_fast.data.emoji import Concept
from limber_fast.models.clip import SmallClip
from limber_fast.models.tokenizer import WordTokenizer, split_words
from limber_fast.training.captions import TEMPLATES


def name_prompts(concept: Concept) -> list[str]:
    """The name in every template."""
    return [template.format(concept.name) for template in TEMPLATES]


def text_prompts(
    concept: Concept, tokenizer: WordTokenizer, *, subgroup: bool = False, translations: bool = False
) -> list[str]:
    """The name, each tag and on demand the subgroup and all that in other languages, a prompt each.

    Words that no training caption held are left out, and texts that then say the same count once.
    """
    texts = [concept.name, *concept.tags]
    if subgroup:
        texts.append(concept.subgroup)
    if translations:
        texts += [text for language in concept.translations.values() for text in language]
    known = (" ".join(filter(tokenizer.known, split_words(text))) for text in texts)
    return list(dict.fromkeys(filter(None, known))) or [concept.name]


@torch.no_grad()
def class_features(
    model: SmallClip, tokenizer: WordTokenizer, prompts: Sequence[Sequence[str]], batch: int = 4096
) -> Tensor:
    """Each prompt's features normalised, their mean over a class, normalised again.

    Args:
        prompts: the texts of each class, at least one of each.
    Returns: [D, C] fp32.
    """
    tokens = tokenizer([text for texts in prompts for text in texts])
    features = torch.cat([model.encode_text(part, normalize=True) for part in tokens.split(batch)])
    means = [part.mean(0) for part in features.split([len(texts) for texts in prompts])]
    return F.normalize(torch.stack(means), dim=1).T


@torch.no_grad()
def image_features(model: SmallClip, images: Tensor, batch: int = 512) -> Tensor:
    """Normalised image features of [N, 3, H, W] uint8 images: [N, D] fp32."""
    parts = [model.encode_image(part.float() / 255, normalize=True) for part in images.split(batch)]
    return torch.cat(parts)


def similarities(features: Tensor, classes: Tensor) -> Tensor:
    """Cosine similarity of images [N, D] and classes [D, C]."""
    return features @ classes
