"""Captions of a concept: its name or another of its names, in a template, sometimes with tags or the subgroup."""

from __future__ import annotations

import random
from collections.abc import Iterator

from limber_fast.data.emoji import Concept
from limber_fast.models.tokenizer import split_words
from limber_fast.training.config import CaptionConfig

# Zero-shot classification uses the same templates (evaluation/zero_shot.py).
TEMPLATES = ("{}", "an emoji of {}", "a drawing of {}", "{} icon", "a small picture of {}", "{} emoji")


def with_tags(name: str, tags: list[str] | tuple[str, ...]) -> str:
    """'name, tag, tag': the form that training captions and prompts share."""
    return ", ".join([name, *tags])


class CaptionSampler:
    """Draws one caption of a concept; `all_texts` holds every word it can draw."""

    def __init__(self, config: CaptionConfig):
        self.config = config

    def __call__(self, concept: Concept, rng: random.Random) -> str:
        config = self.config
        others = (*concept.names[1:], *concept.tags)
        name = concept.name if not others or rng.random() < config.name else rng.choice(others)
        text = rng.choice(TEMPLATES).format(name)
        if concept.tags and rng.random() < config.with_tags:
            text = with_tags(text, rng.sample(concept.tags, min(len(concept.tags), rng.randint(1, config.max_tags))))
        if rng.random() < config.with_subgroup:
            text = f"{text}, {concept.subgroup.replace('-', ' ')}"
        if config.word_dropout:
            words = split_words(text)
            text = " ".join([word for word in words if rng.random() >= config.word_dropout] or words)
        return text

    @staticmethod
    def all_texts(concepts: list[Concept]) -> Iterator[str]:
        """Texts that together hold every word of every caption that can be drawn: what the vocabulary is built from."""
        yield from TEMPLATES
        for concept in concepts:
            yield from (*concept.names, *concept.tags, concept.subgroup)
