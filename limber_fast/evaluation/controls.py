"""What a captioner has to beat: the most frequent answer, another image, and, as a ceiling, the image told in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import TypeVar

import numpy as np

from limber_fast import checks
from limber_fast.evaluation.vqa import normalize_answer

Image = TypeVar("Image", bound=Hashable)


def majority_answer(answers: Sequence[str]) -> str:
    """The most frequent normalised answer, of equally frequent ones the first: the best guess of who sees nothing.

    Take it from the training set, or from the shots alone to match a few-shot model.
    """
    checks.texts("majority_answer", "answers", answers)
    return Counter(map(normalize_answer, answers)).most_common(1)[0][0]


def majority_answers(kinds: Sequence[Hashable], answers: Sequence[str], asked: Sequence[Hashable]) -> list[str]:
    """For each question of kind `asked[i]` the most frequent answer of that kind, or of all where the kind is new.

    Args:
        kinds, answers: the training questions' kinds (a question type, or the question itself) and their answers.
        asked: [N], the kinds of the questions to answer.
    """
    checks.texts("majority_answers", "answers", answers)
    checks.as_long("majority_answers", "kinds", kinds, "answers", answers)
    of_kind: dict[Hashable, list[str]] = {}
    for kind, answer in zip(kinds, answers, strict=True):
        of_kind.setdefault(kind, []).append(answer)
    best = {kind: majority_answer(texts) for kind, texts in of_kind.items()}
    overall = majority_answer(answers)
    return [best.get(kind, overall) for kind in asked]


def derangement(count: int, seed: int = 0) -> np.ndarray:
    """[count] int64: a random permutation that leaves nothing in its place, each as likely as any other.

    Raises: ValueError for fewer than two things.
    """
    checks.two_or_more("derangement", "count", count)
    generator = np.random.default_rng(seed)
    places = np.arange(count)
    while True:  # one permutation in e is one
        found = generator.permutation(count)
        if not (found == places).any():
            return found


def shuffled_images(images: Sequence[Image], seed: int = 0) -> list[Image]:
    """Another image for every row: equal images go to one and the same other image.

    Args:
        images: [N] ids, as many times as there are questions; at least two different ones.
    """
    different = list(dict.fromkeys(images))
    checks.two_or_more("shuffled_images", "the number of different images", len(different))
    other = {image: different[place] for image, place in zip(different, derangement(len(different), seed), strict=True)}
    return [other[image] for image in images]


def text_oracle_prompts(
    descriptions: Sequence[str], questions: Sequence[str], template: str = "{description} Q: {question} A:"
) -> list[str]:
    """The prompt of each question with its image told in words: what the language model alone makes of a perfect
    encoder. With soft prompts in place of the description it is LiMBeR's own prompt.

    Args:
        descriptions: [N], what is in the image. questions: [N].
        template: holds `{description}` and `{question}`.
    """
    checks.texts("text_oracle_prompts", "descriptions", descriptions)
    checks.texts("text_oracle_prompts", "questions", questions)
    checks.as_long("text_oracle_prompts", "questions", questions, "descriptions", descriptions)
    pairs = zip(descriptions, questions, strict=True)
    return [template.format(description=description, question=question) for description, question in pairs]
