"""CIDEr-D: equal to pycocoevalcap, to published figures, and honest where nothing can be compared."""

import itertools

import numpy as np
import pytest
from caption_cases import captions

from limber_fast.data.index import BrokenIndex
from limber_fast.evaluation.cider import DocumentFrequency, best_constant, cider_d


def sets(images: int, seed: int) -> tuple[list[str], list[list[str]]]:
    """Captions, and one to six references per image; some captions are among their references, some are empty."""
    chosen = np.random.default_rng(seed)
    drawn = iter(captions(20 * images, seed))
    references = [list(itertools.islice(drawn, int(chosen.integers(1, 7)))) for _ in range(images)]
    found = [texts[0] if chosen.random() < 0.3 else next(drawn) for texts in references]
    return ["", "one", references[2][0], *found[3:]], references


def pycocoevalcap_scores(found: list[str], references: list[list[str]]) -> np.ndarray:
    scorer = pytest.importorskip("pycocoevalcap.cider.cider").Cider()
    keys = range(len(found))
    return scorer.compute_score({i: references[i] for i in keys}, {i: [found[i]] for i in keys})[1]


@pytest.mark.parametrize(("images", "seed"), [(3, 0), (7, 1), (150, 2)])
def test_equal_to_pycocoevalcap(images, seed):
    found, references = sets(images, seed)
    scores = cider_d(found, references, tokenize=str.split)
    np.testing.assert_allclose(scores, pycocoevalcap_scores(found, references), rtol=0, atol=1e-9)
    assert scores.max() > 1


# The example of github.com/jmhessel/clipscore and the one in the README of github.com/Labbeti/aac-metrics.
CATS = [
    ["two cats are sleeping next to each other.", "a grey cat is cuddling with an orange cat on a blanket.",
     "the orange cat is happy that the black cat is close to it."],
    ["a dog is wearing ear muffs as it lies on a carpet.",
     "a black dog and an orange cat are looking at the photographer.", "headphones are placed on a dogs ears."],
]  # fmt: skip
GOOD = [
    "an orange cat and a grey cat are lying together.",
    "a black dog wearing headphones looks at the camera as an orange cat walks in the background.",
]
BAD = [
    "a calico cat and a white cat are lying together.",
    "a black dog wearing a hat looks at the camera as a tabby walks in the background.",
]
RAIN = [
    ["a man speaks.", "someone speaks.", "a man is speaking while a bird is chirping in the background"],
    ["rain is falling hard on a surface"],
]


def test_published_figures():
    assert cider_d(GOOD, CATS).mean() == pytest.approx(0.5637, abs=5e-5)
    assert cider_d(BAD, CATS).mean() == pytest.approx(0.2790, abs=5e-5)
    scores = cider_d(["a man is speaking", "rain falls"], RAIN)
    assert scores == pytest.approx([1.3641, 0.5587], abs=5e-5)
    assert scores.mean() == pytest.approx(0.9614, abs=5e-5)


def test_document_frequency_from_elsewhere():
    found, references = sets(60, seed=4)
    everything = cider_d(found, references)
    frequency = DocumentFrequency.of(references)
    part = slice(20, 33)
    np.testing.assert_array_equal(
        cider_d(found[part], references[part], document_frequency=frequency), everything[part]
    )
    assert not np.allclose(cider_d(found[part], references[part]), everything[part])


def test_document_frequency_in_a_file(tmp_path):
    found, references = sets(20, seed=5)
    frequency = DocumentFrequency.of(references)
    frequency.save(tmp_path / "frequency.json")
    loaded = DocumentFrequency.load(tmp_path / "frequency.json")
    assert loaded == frequency
    np.testing.assert_array_equal(
        cider_d(found, references, document_frequency=loaded), cider_d(found, references, document_frequency=frequency)
    )
    (tmp_path / "frequency.json").write_text('{"images": 2, "counts": {"a cat": 3}}')
    with pytest.raises(BrokenIndex, match="'a cat' must occur in 1 to 2 images; found 3"):
        DocumentFrequency.load(tmp_path / "frequency.json")
    with pytest.raises(ValueError, match="DocumentFrequency: images must be a whole number of at least 1; got 0"):
        DocumentFrequency(0, {})


def test_a_document_is_an_image():
    frequency = DocumentFrequency.of([["a cat", "a cat a cat"], ["a dog"]])
    assert frequency.images == 2
    assert [frequency.counts.get(tuple(text.split())) for text in ("a", "a cat", "cat dog")] == [2, 1, None]


def test_perfect_and_hopeless():
    references = [["a cat sits on a mat"], ["two dogs run over grass"], ["one red bus"]]
    assert cider_d([texts[0] for texts in references], references) == pytest.approx([10, 10, 7.5])  # no 4-gram: 3 of 4
    assert cider_d(["unheard of words", "", "?"], references).tolist() == [0, 0, 0]
    assert cider_d(["a cat"], [["a cat"]]).tolist() == [0]


def test_errors():
    with pytest.raises(TypeError, match=r"cider_d: captions must be a list of strings.*got str"):
        cider_d("a cat", [["a cat"]])
    with pytest.raises(ValueError, match=r"cider_d: references must have one list per row of captions, 2; got 1"):
        cider_d(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match=r"cider_d: references\[1\] must not be empty"):
        cider_d(["a", "b"], [["a"], []])
    with pytest.raises(TypeError, match=r"cider_d: references\[0\]\[1\] must be a string; got NoneType"):
        cider_d(["a"], [["a", None]])
    with pytest.raises(TypeError, match=r"cider_d: references\[0\] must be a list of strings; got str"):
        cider_d(["a"], ["a"])


@pytest.mark.parametrize(("images", "seed"), [(1, 3), (4, 0), (12, 1), (40, 2)])
def test_the_best_constant(images, seed):
    _, references = sets(max(images, 3), seed)
    references = references[:images]
    frequency = DocumentFrequency.of([*references, ["a man is there", "one"]], str.split)  # of more images
    for options in ({}, {"document_frequency": frequency}):
        options["tokenize"] = str.split
        different = list(dict.fromkeys(text for texts in references for text in texts))
        means = [cider_d([text] * images, references, **options).mean() for text in different]
        found = best_constant(references, **options)
        assert means[different.index(found)] == pytest.approx(max(means), rel=1e-12, abs=1e-300)
        assert len(set(means)) > 1 or found == different[0]


def test_the_best_constant_is_not_the_most_frequent_caption():
    # Said of every image, what a half of them share beats what one image is called twice.
    references = [["a red fox", "a red fox"], ["a dog runs by", "one dog runs"], ["a dog runs by now", "the dog runs"],
                  ["a cat"]]  # fmt: skip
    assert best_constant(references) in ("a dog runs by", "a dog runs by now", "one dog runs", "the dog runs")
