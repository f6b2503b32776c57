"""Evaluation that cannot flatter: ties, NaN, baselines and the split."""

import numpy as np
import pytest
import torch

pytest.importorskip("open_clip")

from open_clip.zero_shot_classifier import build_zero_shot_classifier

from limber_fast.data.emoji import concepts
from limber_fast.evaluation.baselines import pixel_nearest_neighbour
from limber_fast.evaluation.emoji import TestSet
from limber_fast.evaluation.linear_probe import linear_probe
from limber_fast.evaluation.ranking import chance, ranks, top_k
from limber_fast.evaluation.zero_shot import class_features, name_prompts, text_prompts
from limber_fast.models.clip import SmallClip, SmallClipConfig
from limber_fast.models.tokenizer import WordTokenizer
from limber_fast.training.captions import TEMPLATES


def test_ties_count_against():
    scores = torch.tensor([[1.0, 0, 0], [1, 1, 0], [2, 2, 2]])
    assert ranks(scores, torch.zeros(3, dtype=torch.int64)).tolist() == [0, 1, 2]
    assert top_k(scores, torch.zeros(3, dtype=torch.int64))["top1"] == pytest.approx(100 / 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_must_be_finite(bad):
    with pytest.raises(ValueError, match="NaN"):
        ranks(torch.tensor([[0.0, bad]]), torch.tensor([0]))
    with pytest.raises(ValueError, match="finite"):
        ranks(torch.tensor([[-torch.inf, 0.0]]), torch.tensor([0]))


def test_a_share_of_no_images_is_refused():
    with pytest.raises(ValueError, match="top_k: labels must hold at least one image; got none"):
        top_k(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))


def test_class_features_are_open_clips():
    tokenizer = WordTokenizer.from_captions(c.name for c in concepts())
    model = SmallClip(SmallClipConfig(vocab_size=tokenizer.vocab_size)).eval()
    names = [c.name for c in concepts()[:300]]
    templates = [lambda name, template=template: template.format(name) for template in TEMPLATES]
    expected = build_zero_shot_classifier(model, tokenizer, names, templates)
    found = class_features(model, tokenizer, [name_prompts(c) for c in concepts()[:300]], batch=100)
    torch.testing.assert_close(found, expected)


def test_text_prompts():
    octopus = next(c for c in concepts() if c.name == "octopus")
    tokenizer = WordTokenizer.from_captions(["octopus sea creature animal marine tintenfisch pulpo"])
    found = text_prompts(octopus, tokenizer, subgroup=True)
    assert found[0] == "octopus" and "animal marine" in found and len(set(found)) == len(found)
    more = text_prompts(octopus, tokenizer, translations=True)
    assert {"tintenfisch", "pulpo"} <= set(more) and set(text_prompts(octopus, tokenizer)) <= set(more)
    assert text_prompts(octopus, WordTokenizer(["x"])) == ["octopus"]


def test_chance():
    assert chance(1594) == pytest.approx({"top1": 100 / 1594, "top5": 500 / 1594})
    assert chance(3)["top5"] == 100


def test_pixel_neighbour_finds_a_copy_and_ties_equal_drawings():
    drawn = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    drawn[5] = drawn[0]
    classes = torch.tensor([0, 1, 2, 3, 3, 4])
    scores = pixel_nearest_neighbour(drawn[:3], drawn, classes, 7)
    assert ranks(scores, torch.tensor([0, 1, 2])).tolist() == [1, 0, 0]
    assert (scores[:, 5:] == -torch.inf).all()


@pytest.mark.parametrize("make", [TestSet.shipped, TestSet.validation])
def test_unseen_families_were_never_trained_on(make):
    test_set = make()
    known = concepts()
    trained = {known[i].family for i in test_set.train.concept.tolist()}
    unseen = test_set.test.concept[test_set.unseen].tolist()
    assert len(unseen) > 50
    assert not trained & {known[i].family for i in unseen}
    assert (test_set.gallery[test_set.labels] == test_set.test.concept).all()


def test_validation_never_meets_the_test():
    test_set = TestSet.validation()
    known = concepts()
    assert not any(known[i].split == "test" for i in test_set.train.concept.tolist() + test_set.test.concept.tolist())


def test_linear_probe_reads_a_linear_label():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(300, 8))
    labels = np.where(features[:, 0] > 0, "a", "b")
    parts = [(features[i : i + 100], labels[i : i + 100]) for i in (0, 100, 200)]
    assert linear_probe(parts[0], parts[1], {"test": parts[2]})["test"] > 90
