"""The concepts behind the emoji atlases: names, tags, groups, families, and who drew what."""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np


@dataclass(frozen=True)
class Concept:
    """One emoji without skin tones. English texts; `translations` holds those of other languages.

    Attributes:
        index: position in `concepts()`, the class label of every picture of it.
        slug: the name in lower case with hyphens, unique.
        emoji: the characters.
        name: the CLDR label.
        tags: search keywords, CLDR's and then emojilib's.
        names: all reference names, `name` first, then the shortcodes of several vendors as words.
        group, subgroup: Unicode's two levels, e.g. "animals-nature", "animal-mammal".
        gender: "female", "male", or "" for neither or both.
        skin_tones: how many people in the picture can take a skin tone (0, 1 or 2).
        family: concepts whose drawings differ only in gender, direction, hair, colour, clock hand and the like.
        split: "test" and "validation" concepts are the unseen ones of those evaluations; families are never divided.
    """

    index: int
    slug: str
    emoji: str
    name: str
    tags: tuple[str, ...]
    names: tuple[str, ...]
    group: str
    subgroup: str
    gender: str
    skin_tones: int
    family: str
    split: str

    @property
    def held_out(self) -> bool:
        """True where no picture of the concept's family may be trained on."""
        return self.split == "test"

    @property
    def translations(self) -> dict[str, tuple[str, ...]]:
        """{language: (CLDR name, *search keywords)}, of the languages that have a name for it."""
        return _translations()[self.index]


def _parsed(name: str) -> dict:
    return json.loads((files(__package__) / name).read_text(encoding="utf-8"))


@cache
def table() -> dict:
    """The parsed concepts.json."""
    return _parsed("concepts.json")


@cache
def _translations() -> list[dict[str, tuple[str, ...]]]:
    found = _parsed("translations.json")
    return [
        {language: tuple(texts) for language, texts in zip(found["languages"], row, strict=True) if texts}
        for row in found["translations"]
    ]


@cache
def _concepts() -> tuple[Concept, ...]:
    return tuple(
        Concept(index, **(row | {"tags": tuple(row["tags"]), "names": (row["name"], *row["names"])}))
        for index, row in enumerate(table()["concepts"])
    )


def concepts() -> list[Concept]:
    """All concepts in CLDR order; `concepts()[i].index == i`."""
    return list(_concepts())


def credits() -> list[str]:
    """One line per style with artist, licence and source: show it wherever the pictures are shown."""
    return [
        f"{style['name']}: {style['attribution']}, {style['licence']}, {style['source']}" for style in table()["styles"]
    ]


@cache
def atlas(style: str) -> tuple[np.ndarray, np.ndarray]:
    """The pictures of one style, decoded once per process and read-only.

    Returns:
        images: [n, 32, 32, 3] uint8, on white.
        concept: [n] int64, ascending.
    """
    from PIL import Image

    cell, columns = table()["cell"], table()["columns"]
    concept = np.asarray(next(entry["cells"] for entry in table()["styles"] if entry["name"] == style), np.int64)
    with (files(__package__) / f"{style}.png").open("rb") as file, Image.open(file) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    rows = len(pixels) // cell
    images = pixels.reshape(rows, cell, columns, cell, 3).swapaxes(1, 2).reshape(-1, cell, cell, 3)[: len(concept)]
    images = np.ascontiguousarray(images)
    images.flags.writeable = concept.flags.writeable = False
    return images, concept
