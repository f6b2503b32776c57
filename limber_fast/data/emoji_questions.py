"""Visual questions about emoji with their answers: group, subgroup, colour, gender, skin tone.

Colour is read from a drawing's pixels, all else is the concept's. The drawings that ship have no skin tones, so the
question about tone asks whether there are variants of the emoji in skin tones.
"""

from __future__ import annotations

import colorsys
from collections import Counter
from collections.abc import Callable

import numpy as np

from limber_fast.data.emoji import Concept

QUESTIONS = {
    "group": "What group is it?",
    "subgroup": "What subgroup is it?",
    "colour": "What colour is it?",
    "gender": "Is it a woman or a man?",
    "tone": "Does it take a skin tone?",
}
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "grey")
_GENDERS = {"female": "woman", "male": "man", "": None}
_ANSWERS: dict[str, Callable[[Concept], str | None]] = {
    "group": lambda concept: concept.group.replace("-", " "),
    "subgroup": lambda concept: concept.subgroup.replace("-", " "),
    "gender": lambda concept: _GENDERS[concept.gender],
    "tone": lambda concept: "yes" if concept.skin_tones else "no",
}


def answer_of(kind: str, concept: Concept, image: np.ndarray | None = None) -> str | None:
    """The answer to `QUESTIONS[kind]`, None where it has none.

    Args: image: [32, 32, 3] uint8, which colour alone is read from.
    """
    return main_colour(image) if kind == "colour" else _ANSWERS[kind](concept)


def main_colour(image: np.ndarray) -> str | None:
    """The colour of most pixels that are not white; None where it has less than 40% of them, or there are none."""
    counts = Counter(name for pixel in image.reshape(-1, 3).tolist() if (name := _colour(*pixel)) is not None)
    if not counts:
        return None
    (name, count), *_ = counts.most_common(1)
    return name if count >= 0.4 * counts.total() else None


def _colour(red: int, green: int, blue: int) -> str | None:
    hue, saturation, value = colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)
    if value > 0.9 and saturation < 0.1:
        return None
    if value < 0.2:
        return "black"
    if saturation < 0.18:
        return "grey"
    degrees = 360 * hue
    if degrees < 45 and value < 0.65 and degrees > 8:
        return "brown"
    if (degrees >= 310 or degrees < 12) and saturation < 0.6 and value > 0.7:
        return "pink"
    ends = ((14, "red"), (40, "orange"), (68, "yellow"), (165, "green"), (255, "blue"), (300, "purple"), (340, "pink"))
    return next((name for end, name in ends if degrees < end), "red")
