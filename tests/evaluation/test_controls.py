"""Controls and domains."""

from collections import Counter

import numpy as np
import pytest
from caption_cases import captions

from limber_fast.evaluation.cider import DocumentFrequency, cider_d
from limber_fast.evaluation.controls import (
    derangement,
    majority_answer,
    majority_answers,
    shuffled_images,
    text_oracle_prompts,
)
from limber_fast.evaluation.nocaps import by_domain, domain_frequencies, nocaps_cider_d


def test_majority():
    assert majority_answer(["yes", "The dog", "dog.", "yes", "Yes", "a dog", "dog"]) == "dog"
    assert majority_answer(["no", "yes", "No.", "Yes"]) == "no"  # a tie: the first
    kinds = ["colour", "colour", "colour", "count", "count"]
    found = majority_answers(kinds, ["red", "blue", "Red", "two", "2"], ["count", "colour", "where", "count"])
    assert found == ["2", "red", "red", "2"]


@pytest.mark.parametrize("count", [2, 3, 10, 1001])
def test_derangement(count):
    found = derangement(count, seed=count)
    assert sorted(found) == list(range(count)) and not (found == np.arange(count)).any()
    assert (derangement(count, seed=count) == found).all()


def test_derangements_are_equally_likely():
    seen = Counter(tuple(derangement(4, seed)) for seed in range(1800))
    assert len(seen) == 9 and min(seen.values()) > 150 and max(seen.values()) < 250  # 200 +- 13


def test_shuffled_images_never_show_the_own_image():
    images = [f"{i % 7}.jpg" for i in range(40)]
    found = shuffled_images(images, seed=1)
    assert all(a != b for a, b in zip(found, images, strict=True))
    assert len(set(zip(images, found, strict=True))) == 7 and set(found) == set(images)
    with pytest.raises(ValueError, match="number of different images must be at least 2; got 1"):
        shuffled_images(["a", "a"])


def test_text_oracle():
    found = text_oracle_prompts(["A red bus."], ["What colour is it?"])
    assert found == ["A red bus. Q: What colour is it? A:"]
    assert text_oracle_prompts(["x"], ["y"], template="{question}|{description}") == ["y|x"]


def test_domains():
    domains = ["near-domain", "in-domain", "near-domain"]
    found = by_domain(np.array([1.0, 2.0, 3.0]), domains)
    assert {name: scores.tolist() for name, scores in found.items()} == {
        "in-domain": [2], "near-domain": [1, 3], "all": [1, 2, 3]
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"by_domain: domains\[1\] must be one of 'in-domain', .*; got 'far'"):
        by_domain([0.0, 1.0], ["in-domain", "far"])
    with pytest.raises(ValueError, match="scores must be finite"):
        by_domain([np.inf], ["in-domain"])


def test_nocaps_scores_each_domain_as_a_set():
    texts = captions(240, seed=9)
    found, references = texts[:40], [texts[40 + 5 * i : 45 + 5 * i] for i in range(40)]
    found[::2] = [reference[0] for reference in references[::2]]
    domains = ["in-domain", "near-domain", "out-domain", "near-domain"] * 10
    scores = nocaps_cider_d(found, references, domains)
    assert list(scores) == ["in-domain", "near-domain", "out-domain", "all"]
    assert [len(part) for part in scores.values()] == [10, 20, 10, 40]
    np.testing.assert_array_equal(scores["all"], cider_d(found, references))
    np.testing.assert_array_equal(scores["near-domain"], cider_d(found[1::2], references[1::2]))
    frequencies = domain_frequencies(references, domains)
    assert list(frequencies) == list(scores) and frequencies["all"] == DocumentFrequency.of(references)
    part = nocaps_cider_d(found[:8], references[:8], domains[:8], document_frequency=frequencies)
    np.testing.assert_array_equal(part["near-domain"], scores["near-domain"][:4])
    shared = nocaps_cider_d(found, references, domains, document_frequency=dict.fromkeys(scores, frequencies["all"]))
    np.testing.assert_array_equal(shared["near-domain"], scores["all"][1::2])
    assert not np.allclose(scores["near-domain"], shared["near-domain"])
