"""Two figures of the CLIP paper in miniature: zero-shot CLIP against a linear probe, and robustness to a new vendor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from limber_fast import checks
from limber_fast.data.emoji import EmojiDataset, concepts
from limber_fast.evaluation.emoji import TestSet
from limber_fast.evaluation.linear_probe import fit_probe, probe_of
from limber_fast.evaluation.ranking import top_k
from limber_fast.evaluation.zero_shot import class_features, image_features, name_prompts, similarities
from limber_fast.models.clip import SmallClip, SmallResNet
from limber_fast.models.tokenizer import WordTokenizer
from limber_fast.training.drawings import Drawings
from limber_fast.training.other_encoders import subgroups
from limber_fast.training.projection import Standardise, grid_features


@dataclass(frozen=True)
class GroupAccuracy:
    """Percent of the unseen vendor's drawings of a group of concepts that are named right among the group's names.
    Ties count as wrong."""

    group: str
    names: int
    images: int
    zero_shot: float
    probe: float


@dataclass(frozen=True)
class Shift:
    """Percent of drawings of held-out concepts whose subgroup is right: by the training vendors, by the unseen one.
    Ties count as wrong."""

    model: str
    known_vendors: float
    unseen_vendor: float


def against_probe(
    clip: SmallClip, tokenizer: WordTokenizer, supervised: SmallResNet, test_set: TestSet
) -> list[GroupAccuracy]:
    """Names within each group of seen concepts (CLIP paper, figure 5): CLIP's, told the names in words, against
    logistic regression on the label-supervised tower's features, fitted on the training vendors' drawings."""
    known, train, test = concepts(), test_set.train, test_set.test
    features = grid_features(supervised, train.images)
    standard = Standardise.of(features)
    features, tested = standard(features).numpy(), standard(grid_features(supervised, test.images)).numpy()
    for name, x in (("features of train", features), ("features of test", tested)):
        checks.finite_scores("against_probe", name, x)
    pictures = image_features(clip, test.images)
    drawn, asked = train.concept.numpy(), test.concept.numpy()
    group_of = np.array([concept.group for concept in known])
    names_of = {group: np.unique(drawn[group_of[drawn] == group]) for group in dict.fromkeys(group_of[drawn])}
    middle = sorted(names_of, key=lambda group: len(names_of[group]))[len(names_of) // 2]
    strength = _strength(features, drawn, group_of[drawn] == middle)
    found = []
    for group, names in names_of.items():
        fit, rows = group_of[drawn] == group, (group_of[asked] == group) & test_set.seen.numpy()
        if len(names) < 2 or not rows.any():
            continue
        probe = probe_of(strength).fit(features[fit], drawn[fit])
        prompts = [name_prompts(known[i]) for i in names]
        labels = torch.from_numpy(np.searchsorted(names, asked[rows]))  # `names` are the probe's classes, in its order
        by_names = similarities(pictures[rows], class_features(clip, tokenizer, prompts))
        by_probe = torch.from_numpy(probe.predict_proba(tested[rows]))
        zero_shot, percent = (top_k(scores, labels)["top1"] for scores in (by_names, by_probe))
        found.append(GroupAccuracy(group.replace("-", " "), len(names), int(rows.sum()), zero_shot, percent))
    return found


def _strength(features: np.ndarray, drawn: np.ndarray, rows: np.ndarray) -> float:
    """C, chosen on the last drawing of each concept. On one group, of middling size: all nine take minutes."""
    features, drawn = features[rows], drawn[rows]
    held = np.zeros(len(drawn), bool)
    held[len(drawn) - 1 - np.unique(drawn[::-1], return_index=True)[1]] = True
    return fit_probe(*((features[chosen], drawn[chosen]) for chosen in (~held, held)))[0]


@torch.no_grad()
def robustness(clip: SmallClip, tokenizer: WordTokenizer, supervised: SmallResNet, test_set: TestSet) -> list[Shift]:
    """Subgroups of concepts that neither was trained on, in the vendors' styles that both were trained on, and in the
    unseen vendor's (CLIP paper, figure 13). CLIP's class is the mean of the names of a subgroup's other concepts; the
    supervised tower says its own label."""
    known, labels = concepts(), subgroups()
    trained = torch.unique(test_set.train.concept).tolist()
    prompts = [[s.replace("-", " "), *(known[i].name for i in trained if known[i].subgroup == s)] for s in labels]
    classes = class_features(clip, tokenizer, prompts)
    unseen = test_set.test[test_set.unseen]
    same = Drawings.of(EmojiDataset(concepts="unseen"))
    same = same[torch.isin(same.concept, unseen.concept)]

    def right(scores: Tensor, drawings: Drawings) -> float:
        truth = torch.tensor([labels.index(known[i].subgroup) for i in drawings.concept.tolist()])
        return top_k(scores, truth)["top1"]

    def by_names(drawings: Drawings) -> Tensor:
        return similarities(image_features(clip, drawings.images), classes)

    def by_label(drawings: Drawings) -> Tensor:
        return torch.cat([supervised(part.float() / 255) for part in drawings.images.split(512)])

    return [
        Shift(name, right(scores_of(same), same), right(scores_of(unseen), unseen))
        for name, scores_of in (("zero-shot CLIP", by_names), ("supervised classifier", by_label))
    ]
