"""VQA accuracy with the official answer normalisation (arXiv 1505.00468, section 3; code of the VQA challenge)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from limber_fast import checks

VARIANTS = ("official", "simple")

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = ("none zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(value) for value, words in enumerate(_NUMBERS) for word in words.split()}
_ARTICLES = ("a", "an", "the")
# An answer that lacks one apostrophe of these gets it back. Those that would be another word ("well", "its") are not in
# the official table, and neither are the first person's, whose capital never survives.
_CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've "
    "weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've "
    "why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're "
    "you've"
)
_APOSTROPHES = {
    form[:at] + form[at + 1 :]: form for form in _CONTRACTIONS.split() for at, sign in enumerate(form) if sign == "'"
} | {"somebody'd": "somebodyd"}  # the official table has this one backwards
_THOUSANDS = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")


@lru_cache(maxsize=1 << 17)  # answers repeat: VQAv2's two million hold about a hundred thousand
def normalize_answer(text: str) -> str:
    """The official normalisation: punctuation, then lower case, digits for number words, no articles, apostrophes.

    A punctuation mark is removed where one of its kind touches a space or where the answer has a comma between
    digits, and becomes a space otherwise; a full stop is removed unless a digit follows. "None" is the number 0.
    """
    text = _one_line(text)
    spread = _THOUSANDS.search(text) is not None
    found = text
    for sign in _PUNCTUATION:
        removed = spread or sign + " " in text or " " + sign in text
        found = found.replace(sign, "" if removed else " ")
    words = (_DIGITS.get(word, word) for word in _FULL_STOP.sub("", found).lower().split())
    return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in _ARTICLES)


def truncate_answer(text: str, annotators: Sequence[str]) -> str:
    """The first words of a generated answer, as many as the longest of the annotators' has.

    The rule of LiMBeR's evaluation (github.com/jmerullo/limber, issue 2).
    """
    return " ".join(text.split()[: max(len(answer.split()) for answer in annotators)])


def vqa_accuracy(
    answers: Sequence[str], annotators: Sequence[Sequence[str]], *, variant: str = "official"
) -> np.ndarray:
    """VQA accuracy of every answer; both variants compare in the official way.

    "official": the mean over annotators of min(1, matches among the others / 3): of ten, 1, 2, 3 and 4 matches give
    0.3, 0.6, 0.9 and 1. "simple": min(1, matches / 3). Compared in lower case, after `normalize_answer` where the
    annotators differ among themselves: the official code leaves answers alone where all annotators agree.

    Args:
        answers: one per question.
        annotators: per question the answers of its annotators, ten in VQAv2; for "official" at least two.
    Returns: [N] fp64, 0 to 1.
    Raises: ValueError or TypeError for lists of other lengths, too few annotators, or what is no string.
    """
    checks.choice("vqa_accuracy", "variant", variant, VARIANTS)
    checks.texts("vqa_accuracy", "answers", answers)
    checks.text_sets("vqa_accuracy", "annotators", annotators, "answers", answers)
    if variant == "official":
        checks.at_least_two("vqa_accuracy", "annotators", annotators, "variant='simple' takes one")
    return np.array([_accuracy(answer, others, variant) for answer, others in zip(answers, annotators, strict=True)])


def _accuracy(answer: str, annotators: Sequence[str], variant: str) -> float:
    answer, annotators = _one_line(answer), [_one_line(other) for other in annotators]
    if len(set(annotators)) > 1:
        answer, annotators = normalize_answer(answer), [normalize_answer(other) for other in annotators]
    matches = sum(other.lower() == answer.lower() for other in annotators)
    if variant == "simple":
        return min(1.0, matches / 3)
    missed = len(annotators) - matches
    return (matches * min(1.0, (matches - 1) / 3) + missed * min(1.0, matches / 3)) / len(annotators)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
