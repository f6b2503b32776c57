"""`EmojiDataset`: the atlases as an ordinary map-style dataset, split by vendor and by family of concepts."""

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
from torch.utils.data import Dataset

from .table import atlas, concepts

TRAIN_STYLES = ("twemoji", "noto", "noto-v1", "emojione", "fxemoji")
TEST_STYLE = "fluent-emoji-flat"
STYLES = (*TRAIN_STYLES, TEST_STYLE)
# Of the five, emojione is the least copied: pixel nearest neighbour from the other four names 28% of its pictures, as
# for the test vendor (31% from all five); the rest are partly redrawn from each other (fxemoji 41, noto 41, noto-v1 39,
# twemoji 37%) and would reward copying.
VALIDATION_STYLE = "emojione"
FOLDS = ("train", "validation")
WHICH = ("seen", "unseen", "all")


class EmojiDataset(Dataset):
    """Pictures of emoji with the index of the concept they draw.

    `ds[i] -> (image, concept)` with a 32 x 32 RGB PIL image, or `transform(image)`, and an int into `concepts()`.
    The same data at once: `images`, `concept`, `style`.

    Args:
        styles: one style or several; by default the training styles of the fold.
        concepts: "seen" (may be trained on), "unseen" (held out by family) or "all".
        fold: None for the real split: all but the held-out families may be trained on, `TEST_STYLE` is the test.
            "train" and "validation" are the same in small inside the training data, for choosing settings: the vendor
            left out is `VALIDATION_STYLE`, the unseen concepts are a further tenth, and the test's are in neither.
        transform: applied to the PIL image.

    Raises:
        ValueError: an unknown style, concepts or fold, or a style that the fold does not hold.
    """

    def __init__(
        self,
        styles: str | Sequence[str] | None = None,
        concepts: str = "seen",
        *,
        fold: str | None = None,
        transform: Callable | None = None,
    ):
        if concepts not in WHICH:
            raise ValueError(f"EmojiDataset: concepts must be one of {', '.join(WHICH)}; got {concepts!r}")
        if fold is not None and fold not in FOLDS:
            raise ValueError(f"EmojiDataset: fold must be None or one of {', '.join(FOLDS)}; got {fold!r}")
        allowed = _styles_of(fold)
        if styles is None:
            styles = TRAIN_STYLES if fold is None else allowed
        styles = (styles,) if isinstance(styles, str) else tuple(styles)
        wrong = [style for style in styles if style not in allowed]
        if wrong or not styles or len(set(styles)) < len(styles):
            where = f" with fold={fold!r}" if fold else ""
            raise ValueError(
                f"EmojiDataset: styles must be distinct names out of {', '.join(allowed)}{where}; got {list(styles)!r}"
            )
        self.styles, self.concepts, self.fold, self.transform = styles, concepts, fold, transform

    @cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        wanted = _wanted(self.concepts, self.fold)
        images, concept, style = [], [], []
        for name in self.styles:
            drawn, index = atlas(name)
            keep = wanted[index]
            images.append(drawn[keep])
            concept.append(index[keep])
            style.append(np.full(int(keep.sum()), STYLES.index(name), np.int64))
        arrays = tuple(np.concatenate(parts) for parts in (images, concept, style))
        for array in arrays:
            array.flags.writeable = False
        return arrays

    @property
    def images(self) -> np.ndarray:
        """[n, 32, 32, 3] uint8, read-only."""
        return self._arrays[0]

    @property
    def concept(self) -> np.ndarray:
        """[n] int64, indices into `concepts()`."""
        return self._arrays[1]

    @property
    def style(self) -> np.ndarray:
        """[n] int64, indices into `STYLES`."""
        return self._arrays[2]

    def __len__(self) -> int:
        return len(self.concept)

    def __getitem__(self, index: int):
        from PIL import Image

        image = Image.fromarray(self.images[index])
        return (image if self.transform is None else self.transform(image)), int(self.concept[index])

    def __getstate__(self) -> dict:
        # A spawned DataLoader worker decodes for itself: 25 MB of pixels are not worth pickling.
        return {key: value for key, value in self.__dict__.items() if key != "_arrays"}

    def __repr__(self) -> str:
        fold = f", fold={self.fold!r}" if self.fold else ""
        return f"EmojiDataset({', '.join(self.styles)}; concepts={self.concepts!r}{fold}; {len(self)} images)"


def _styles_of(fold: str | None) -> tuple[str, ...]:
    if fold is None:
        return STYLES
    return (VALIDATION_STYLE,) if fold == "validation" else tuple(s for s in TRAIN_STYLES if s != VALIDATION_STYLE)


def _wanted(which: str, fold: str | None) -> np.ndarray:
    """[concepts] bool."""
    split = np.array([concept.split for concept in concepts()])
    unseen = split == ("test" if fold is None else "validation")
    usable = np.full(len(split), True) if fold is None else split != "test"
    return usable & {"seen": ~unseen, "unseen": unseen, "all": np.full(len(split), True)}[which]
