"""VQA accuracy: normalisation as the official code does it, both variants against their definitions."""

import random

import numpy as np
import pytest

from limber_fast.evaluation.exact_match import exact_match
from limber_fast.evaluation.vqa import normalize_answer, truncate_answer, vqa_accuracy


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  The Cat.\n", "cat"),
        ("a an the", ""),
        ("Two dogs", "2 dogs"),
        ("none", "0"),
        ("ten", "10"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("x-ray", "x ray"),
        ("x- ray", "x ray"),
        ("x- ray-gun", "x raygun"),  # one hyphen beside a space: all of them go
        ("1,000", "1000"),
        ("1,000-foot", "1000foot"),  # a comma between digits: every mark goes
        ("red, white,blue", "red whiteblue"),
        ("red,blue", "red blue"),
        ("3.5", "3.5"),
        (".5", ".5"),
        ("5.", "5"),
        ("u.s.", "us"),
        ("dont", "don't"),
        ("don't", "don't"),
        ("couldnt've couldn'tve", "couldn't've couldn't've"),
        ("youll its", "you'll its"),
        ("yalld've y'alld've", "yalld've y'all'd've"),
        ("Im", "im"),
        ("oclock", "o'clock"),
        ("somebody'd", "somebodyd"),
        ("12:30", "12:30"),
        ("'yes'", "'yes'"),
        ("yes!", "yes"),
        ("what?!", "what"),
    ],
)
def test_normalisation(text, expected):
    assert normalize_answer(text) == expected


@pytest.mark.parametrize(("matches", "official"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_ten_annotators(matches, official):
    annotators = ["red"] * matches + ["blue"] * (10 - matches)
    assert vqa_accuracy(["Red."], [annotators if matches < 10 else ["red"] * 9 + ["Red"]]) == pytest.approx([official])
    simple = vqa_accuracy(["red"], [annotators], variant="simple")
    assert simple == pytest.approx([min(matches / 3, 1)])


def leave_one_out(answer, annotators):
    shares = []
    for left_out in range(len(annotators)):
        others = annotators[:left_out] + annotators[left_out + 1 :]
        shares.append(min(1, sum(other == answer for other in others) / 3))
    return np.mean(shares)


def test_official_is_the_mean_over_left_out_annotators():
    chosen = random.Random(0)
    words = ("red", "blue", "big dog", "7")
    annotators = [[chosen.choice(words) for _ in range(chosen.choice((2, 3, 5, 10)))] for _ in range(300)]
    answers = [chosen.choice(words) for _ in annotators]
    expected = [leave_one_out(answer, texts) for answer, texts in zip(answers, annotators, strict=True)]
    np.testing.assert_allclose(vqa_accuracy(answers, annotators), expected, rtol=0, atol=1e-12)


def test_unanimous_answers_are_compared_as_they_stand():
    assert vqa_accuracy(["a cat", "cat", "A Cat"], [["a cat"] * 10] * 3).tolist() == [1, 0, 1]
    assert vqa_accuracy(["cat", "the cat"], [["a cat"] * 9 + ["dog"]] * 2).tolist() == [1, 1]


def test_truncation():
    assert truncate_answer("  a big red bus on\nthe street", ["bus", "red bus"]) == "a big"
    assert truncate_answer("yes", ["two words"]) == "yes"
    assert truncate_answer("", ["two words"]) == ""


def test_errors():
    with pytest.raises(ValueError, match=r"vqa_accuracy: variant must be one of 'official', 'simple'; got 'soft'"):
        vqa_accuracy(["a"], [["a", "b"]], variant="soft")
    with pytest.raises(ValueError, match=r"annotators\[1\] must have at least two entries; got 1; variant='simple'"):
        vqa_accuracy(["a", "b"], [["a", "b"], ["a"]])
    with pytest.raises(TypeError, match=r"annotators\[0\]\[0\] must be a string; got int"):
        vqa_accuracy(["2"], [[2, 2]])
    with pytest.raises(ValueError, match=r"answers must not be empty"):
        vqa_accuracy([], [])


def test_exact_match():
    references = [["grinning face", "smile"], ["The Cat"], ["a"], ["two dogs"]]
    assert exact_match(["Smile!", "cat", "the", "2 dogs"], references).tolist() == [1, 1, 0, 1]
    assert exact_match(["Smile!", "The Cat", "a", "2 dogs"], references, normalize=str.strip).tolist() == [0, 1, 1, 0]
    with pytest.raises(ValueError, match="exact_match: references must have one list per row of predictions, 1; got 4"):
        exact_match(["a"], references)
