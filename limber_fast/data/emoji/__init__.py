"""Emoji in six vendors' styles as image-text pairs: one concept, several drawings, human-written names.

Train on `TRAIN_STYLES`, test on `TEST_STYLE`: the vendors' styles are the distribution shift. A tenth of the test's
concepts is held out by family. `fold="train"` and `fold="validation"`, for choosing settings, never touch the test.

    from limber_fast.data import emoji

    train = emoji.EmojiDataset(transform=augment)                                    # five vendors, seen concepts
    test = emoji.EmojiDataset(emoji.TEST_STYLE, concepts="unseen", transform=prepare)
    image, index = test[0]
    emoji.concepts()[index].names
"""

from .dataset import FOLDS, STYLES, TEST_STYLE, TRAIN_STYLES, VALIDATION_STYLE, EmojiDataset
from .table import Concept, concepts, credits

__all__ = [
    "FOLDS",
    "STYLES",
    "TEST_STYLE",
    "TRAIN_STYLES",
    "VALIDATION_STYLE",
    "Concept",
    "EmojiDataset",
    "concepts",
    "credits",
]
