"""Made-up captions with what COCO's have: possessives, quotes, hyphens, numbers, stray punctuation, capitals."""

from __future__ import annotations

import random

_SUBJECTS = (
    "a man", "two women", "The cat", "a little girl", "three dogs", "an old red bus", "the boys' team", "a man's dog",
    "a half-eaten pizza", "5 zebras", "two double-decker buses", 'A "No Parking" sign', "a St. Bernard", "people",
    "a black-and-white photo", "an A&W stand", "a U.S. plane", "a man in a t-shirt (blue)", "Dr. Jones", "J. Smith",
)  # fmt: skip
_VERBS = (
    "is riding", "are standing next to", "isn't looking at", "can't reach", "cannot see", "holding", ", with", "- on",
    "who's using", "they're near", "w/", "is gonna eat", "and/or", "; near", "lays beside", "'s on top of",
)  # fmt: skip
_OBJECTS = (
    "a wave", "the side of a building", "a horse, and a cart", "St. Louis", "the 1950's", "10:30 a.m.", "3 p.m.",
    "train #5", "a sign reading 'slow down'", "a $5 bill", "2 1/2 pizzas", "the water...", "women's skis", "50% of it",
    "no. 7", "a 12-inch ruler", "a 1,000 lb. bear", "cups/bowls", "mac n' cheese", "a jack-o-lantern", "R2-D2", "skis?",
)  # fmt: skip
_ENDS = (".", ".", " .", "", "!", "...", ". ", "?!", ";", '"', "  ", ".The sky is blue.")


def captions(count: int, seed: int) -> list[str]:
    chosen = random.Random(seed)
    found = []
    for _ in range(count):
        text = " ".join(chosen.choice(words) for words in (_SUBJECTS, _VERBS, _OBJECTS))
        if chosen.random() < 0.3:
            text += " while " + " ".join(chosen.choice(words) for words in (_SUBJECTS, _VERBS, _OBJECTS))
        if chosen.random() < 0.1:
            text = text.upper()
        found.append(text + chosen.choice(_ENDS))
    return found
