"""Captions of a concept: one of its names, in a template, sometimes with tags or the subgroup; often in translation."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

from limber_fast.data.emoji import Concept
from limber_fast.models.tokenizer import split_words
from limber_fast.training.config import CaptionConfig

# Zero-shot classification uses the same templates (evaluation/zero_shot.py).
TEMPLATES = ("{}", "an emoji of {}", "a drawing of {}", "{} icon", "a small picture of {}", "{} emoji")


def with_tags(name: str, tags: list[str] | tuple[str, ...]) -> str:
    """'name, tag, tag'."""
    return ", ".join([name, *tags])


class CaptionSampler:
    """Draws one caption of a concept; `all_texts` holds every word it can draw.

    Translations do not teach the model languages, they teach it concepts: the keywords of each language were chosen by
    other people, and name more of what a concept has in common with others (SETTINGS.md, fourth round).
    """

    def __init__(self, config: CaptionConfig):
        self.config = config

    def __call__(self, concept: Concept, rng: random.Random) -> str:
        config = self.config
        (name, *names), tags, template = concept.names, concept.tags, rng.choice(TEMPLATES)
        if concept.translations and rng.random() < config.translated:
            (name, *tags), names, template = rng.choice(list(concept.translations.values())), [], "{}"
        if (others := (*names, *tags)) and rng.random() >= config.name:
            name = rng.choice(others)
        text = template.format(name)
        if tags and rng.random() < config.with_tags:
            text = with_tags(text, rng.sample(tags, min(len(tags), rng.randint(1, config.max_tags))))
        if rng.random() < config.with_subgroup:
            text = f"{text}, {concept.subgroup.replace('-', ' ')}"
        if config.word_dropout:
            words = split_words(text)
            text = " ".join([word for word in words if rng.random() >= config.word_dropout] or words)
        return text

    def all_texts(self, concepts: Iterable[Concept]) -> Iterator[str]:
        """Texts that together hold every word of every caption that can be drawn: what the vocabulary is built from."""
        yield from TEMPLATES
        for concept in concepts:
            yield from (*concept.names, *concept.tags, concept.subgroup)
            if self.config.translated:
                for texts in concept.translations.values():
                    yield from texts
