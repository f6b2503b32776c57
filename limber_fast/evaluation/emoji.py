"""Everything the demo reports of a trained CLIP: zero-shot tables with baselines, confusion, examples, linear probe."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from limber_fast.data.emoji import TEST_STYLE, Concept, EmojiDataset, concepts
from limber_fast.evaluation.baselines import pixel_nearest_neighbour
from limber_fast.evaluation.linear_probe import linear_probe
from limber_fast.evaluation.ranking import chance, top_k
from limber_fast.evaluation.zero_shot import (
    class_features,
    image_features,
    name_prompts,
    similarities,
    text_prompts,
)
from limber_fast.models.clip import SmallClip
from limber_fast.models.tokenizer import WordTokenizer
from limber_fast.training.drawings import Drawings


@dataclass(frozen=True)
class Example:
    """A test image with the model's five best names; `image` [3, H, W] uint8."""

    image: Tensor
    name: str
    guesses: list[tuple[str, float]]


@dataclass
class Evaluation:
    """Figures in percent. `tables[name]`: top1, top5, images, classes, chance, and pixel where it can answer."""

    tables: dict[str, dict] = field(default_factory=dict)
    probe: dict[str, float] = field(default_factory=dict)
    groups: list[str] = field(default_factory=list)
    confusion: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    examples: list[Example] = field(default_factory=list)


class TestSet:
    """Test drawings with the gallery of names they are classified among.

    Args:
        train: what the model was trained on; its concepts are "seen".
        unseen: the split that counts as unseen.
    """

    __test__ = False  # not a test case, whatever pytest makes of the name

    def __init__(self, train: Drawings, test: Drawings, unseen: str = "test"):
        known = concepts()
        self.train, self.test = train, test
        self.gallery = torch.unique(test.concept)
        self.classes = [known[i] for i in self.gallery.tolist()]
        self.labels = torch.searchsorted(self.gallery, test.concept)
        self.seen = torch.isin(test.concept, train.concept)
        self.unseen = torch.tensor([known[i].split == unseen for i in test.concept.tolist()])

    @classmethod
    def shipped(cls) -> TestSet:
        """The real test: five vendors to train on, the sixth vendor to test on."""
        return cls(Drawings.of(EmojiDataset()), Drawings.of(EmojiDataset(TEST_STYLE, "all")))

    @classmethod
    def validation(cls) -> TestSet:
        """The same question asked of the training vendors alone: the split on which settings are chosen."""
        train, test = EmojiDataset(fold="train"), EmojiDataset(concepts="all", fold="validation")
        return cls(Drawings.of(train), Drawings.of(test), unseen="validation")


def evaluate(
    model: SmallClip, tokenizer: WordTokenizer, test_set: TestSet, *, examples: int = 24, seed: int = 0
) -> Evaluation:
    """All figures of `model` on `test_set`."""
    found = Evaluation()
    test, seen, unseen = test_set.test, test_set.seen, test_set.unseen
    features = image_features(model, test.images)
    by_name = class_features(model, tokenizer, [name_prompts(c) for c in test_set.classes])
    scores = similarities(features, by_name)
    labels = test_set.labels

    known = torch.isin(test_set.train.concept, test_set.gallery)
    drawn = test_set.train[known]
    neighbours = torch.searchsorted(test_set.gallery, drawn.concept)
    pixel = pixel_nearest_neighbour(test.images[seen], drawn.images, neighbours, len(test_set.classes))
    found.tables["seen"] = _row(scores[seen], labels[seen], pixel)
    found.tables["unseen_among_all"] = _row(scores[unseen], labels[unseen])

    columns = torch.unique(labels[unseen])
    few = [test_set.classes[i] for i in columns.tolist()]
    few_labels = torch.searchsorted(columns, labels[unseen])
    everything = {"translations": True, "subgroup": True}
    prompts_of = {
        "unseen_name": [name_prompts(c) for c in few],
        "unseen_name_and_tags": [text_prompts(c, tokenizer) for c in few],
        "unseen_languages": [text_prompts(c, tokenizer, translations=True) for c in few],
        "unseen_everything": [text_prompts(c, tokenizer, **everything) for c in few],
    }
    for name, prompts in prompts_of.items():
        few_scores = similarities(features[unseen], class_features(model, tokenizer, prompts))
        found.tables[name] = _row(few_scores, few_labels)

    found.groups, found.confusion = _confusion(test_set.classes, labels, scores.argmax(1))
    found.examples = _examples(test_set, scores, model.logit_scale.exp().item(), examples, seed)
    found.probe = _probe_group(model, test_set, features)
    return found


def _row(scores: Tensor, labels: Tensor, pixel: Tensor | None = None) -> dict:
    row = {**top_k(scores, labels), "chance": chance(scores.shape[1])}
    return row if pixel is None else {**row, "pixel": top_k(pixel, labels)}


def _confusion(classes: list[Concept], labels: Tensor, guesses: Tensor) -> tuple[list[str], np.ndarray]:
    """Groups in Unicode's order, and counts [true group, group of the best name]."""
    groups = list(dict.fromkeys(c.group for c in classes))
    group_of = torch.tensor([groups.index(c.group) for c in classes])
    cells = group_of[labels] * len(groups) + group_of[guesses]
    counts = torch.bincount(cells, minlength=len(groups) ** 2)
    return groups, counts.view(len(groups), len(groups)).numpy()


def _examples(test_set: TestSet, scores: Tensor, scale: float, count: int, seed: int) -> list[Example]:
    """Random test images, not chosen ones: the page shows failures as often as they happen."""
    rows = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    best = (scale * scores[rows]).softmax(1).topk(5)
    names = [c.name for c in test_set.classes]
    return [
        Example(
            test_set.test.images[row],
            names[int(test_set.labels[row])],
            [(names[j], p) for j, p in zip(indices, values, strict=True)],
        )
        for row, values, indices in zip(rows, best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def _probe_group(model: SmallClip, test_set: TestSet, features: Tensor) -> dict[str, float]:
    """Group of the concept from image features: fitted on training vendors, C chosen on families of its own."""
    known = concepts()
    train = image_features(model, test_set.train.images).numpy()
    labels = np.array([known[i].group for i in test_set.train.concept.tolist()])
    families = np.array([known[i].family for i in test_set.train.concept.tolist()])
    names = np.unique(families)
    np.random.default_rng(0).shuffle(names)
    held = np.isin(families, names[: len(names) // 5])
    truth = np.array([known[i].group for i in test_set.test.concept.tolist()])
    seen, unseen = test_set.seen.numpy(), test_set.unseen.numpy()
    values, counts = np.unique(labels, return_counts=True)
    most = values[counts.argmax()]
    tests = {"seen": (features.numpy()[seen], truth[seen]), "unseen": (features.numpy()[unseen], truth[unseen])}
    majority = {f"{name}_majority": 100 * float((y == most).mean()) for name, (_, y) in tests.items()}
    fitted = linear_probe((train[~held], labels[~held]), (train[held], labels[held]), tests)
    return {**fitted, **majority}
