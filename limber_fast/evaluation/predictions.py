"""Predictions from files: a model's captions or answers and those it is compared with, scored entry by entry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from limber_fast.data.captions import CaptionedImage
from limber_fast.data.index import BrokenIndex, Index
from limber_fast.data.questions import Question
from limber_fast.evaluation.bootstrap import Interval, bootstrap_intervals
from limber_fast.evaluation.cider import DocumentFrequency, Tokenize, best_constant, cider_d
from limber_fast.evaluation.controls import majority_answer, majority_answers, shuffled_images
from limber_fast.evaluation.exact_match import exact_match
from limber_fast.evaluation.nocaps import ALL, domain_frequencies, nocaps_cider_d
from limber_fast.evaluation.tokenize import ptb_tokenize
from limber_fast.evaluation.vqa import truncate_answer, vqa_accuracy

MODEL = "model"
SHUFFLED, BEST_REFERENCE, MAJORITY, MAJORITY_BY_TYPE = (
    "shuffled", "best reference", "majority", "majority by question type"
)  # fmt: skip
# Rows of every evaluation.
CONTROLS = {"caption": (SHUFFLED, MAJORITY, BEST_REFERENCE), "vqa": (MAJORITY, MAJORITY_BY_TYPE)}
Scores = dict[str, np.ndarray]


@dataclass
class Scored:
    """What every row (the model, controls, other models) said and scored on the same entries.

    Attributes:
        ids: [N], of images or questions. images: [N], what is drawn together for intervals.
        texts: by row [N]. scores: by row and metric [N] fp64.
        groups: by name the entries of a domain or answer type; `all` comes last.
        scales: by metric what a mean is multiplied by for print, 100 where it is not named.
        within: as `scores`, of metrics that score a group as a set of its own; used for every group but `all`.
    """

    ids: list
    images: list
    texts: dict[str, list[str]]
    scores: dict[str, Scores]
    groups: dict[str, np.ndarray]
    scales: dict[str, float] = field(default_factory=dict)
    within: dict[str, Scores] = field(default_factory=dict)

    def intervals(self, group: str = ALL, *, seed: int = 0) -> dict[str, dict[str, tuple[Interval, Interval]]]:
        """By row and metric the mean in print's scale and what the model has more than this row, with 95% intervals."""
        index = self.groups[group]
        columns, names = [], [(row, metric) for row, scores in self.scores.items() for metric in scores]
        for row, metric in names:
            within = group != ALL and metric in self.within.get(row, ())
            table = self.within if within else self.scores
            scale = self.scales.get(metric, 100)
            columns += [scale * table[row][metric][index], scale * (table[MODEL][metric] - table[row][metric])[index]]
        found = bootstrap_intervals(np.stack(columns, 1), images=[self.images[i] for i in index], seed=seed)
        result: dict[str, dict] = {row: {} for row in self.scores}
        for (row, metric), pair in zip(names, zip(found[::2], found[1::2], strict=True), strict=True):
            result[row][metric] = pair
        return result


def read_predictions(path: str | Path, key: str, value: str, ids: Sequence, *, subset: bool = False) -> dict:
    """Text by id from a results file in COCO's and VQA's form: a list of objects with `key` and `value`.

    Args:
        key, value: "image_id" and "caption", or "question_id" and "answer".
        ids: those with references. One that is not among them, or is named twice, is an error.
        subset: True lets ids go without; otherwise a missing one is an error: nobody may leave out hard images.
    Raises: BrokenIndex.
    """
    file = Index(path, list)
    known, found = set(ids), {}
    for row, entry in enumerate(file.entries()):
        name = file.field(entry, key, int, str, row=row)
        if name not in known:
            raise file.broken(f"no references for {key} {name!r}", row=row)
        if name in found:
            raise file.broken(f"a second {value} for {key} {name!r}", row=row)
        found[name] = file.field(entry, value, str, row=row)
    missing = [name for name in ids if name not in found]
    if missing and not (subset and found):
        raise BrokenIndex(f"{path}: no {value} for {len(missing)} of {len(ids)}, the first is {key} {missing[0]!r}")
    return found


def score_caption_files(
    records: Sequence[CaptionedImage],
    predictions: dict[str, dict],
    *,
    clip: Callable[[Sequence[CaptionedImage], list[str]], Scores] | None = None,
    seed: int = 0,
) -> Scored:
    """CIDEr-D, exact match and, through `clip`, more of every row of captions; NoCaps' domains as groups.

    Document frequency is of all records, also where only a subset has captions. Three rows of controls are added:
    `shuffled`, the model's captions given to other images; `majority`, of these very references the one that scores
    best as the caption of every image (the most frequent one, where hardly any comes twice, would be any of them, and
    easy to beat); and `best reference`, the reference that scores highest against all of its image's, itself among
    them, which is the ceiling. Published NoCaps figures score each domain as a set of its own, with its own document
    frequency, and so do the groups here.

    Args:
        records: with at least one caption each.
        predictions: by row the caption by image id; all rows have the ids of `MODEL`.
        clip: from records and their captions to scores by metric.
    """
    tokenize = cache(ptb_tokenize)  # references are scored against several times
    every = [record.captions for record in records]
    kept = [record for record in records if record.image_id in predictions[MODEL]]
    ids, references = [record.image_id for record in kept], [record.captions for record in kept]
    domains = [record.domain for record in kept]
    if all(domains):
        frequency = domain_frequencies(every, [record.domain for record in records], tokenize)
    else:
        frequency = {ALL: DocumentFrequency.of(every, tokenize)}
    texts = {row: [captions[name] for name in ids] for row, captions in predictions.items()}
    if len(kept) > 1:
        texts[SHUFFLED] = [predictions[MODEL][name] for name in shuffled_images(ids, seed)]
    texts[MAJORITY] = [best_constant(references, document_frequency=frequency[ALL], tokenize=tokenize)] * len(kept)
    texts[BEST_REFERENCE] = _best_references(references, frequency[ALL], tokenize)
    groups = groups_of(domains)
    scores, within = {}, {}
    for row, captions in texts.items():
        if all(domains):
            cider = nocaps_cider_d(captions, references, domains, document_frequency=frequency, tokenize=tokenize)
        else:
            cider = {ALL: cider_d(captions, references, document_frequency=frequency[ALL], tokenize=tokenize)}
        scores[row] = {"CIDEr-D": cider.pop(ALL), "exact match": exact_match(captions, references)}
        scores[row] |= clip(kept, captions) if clip else {}
        within[row] = {"CIDEr-D": np.full(len(kept), np.nan)}
        for domain, values in cider.items():
            within[row]["CIDEr-D"][groups[domain]] = values
    return Scored(ids, ids, texts, scores, groups, {"CIDEr-D": 100.0}, within)


def _best_references(
    references: Sequence[Sequence[str]], frequency: DocumentFrequency, tokenize: Tokenize
) -> list[str]:
    best = []
    for texts in references:
        scores = cider_d(texts, [texts] * len(texts), document_frequency=frequency, tokenize=tokenize)
        best.append(texts[int(scores.argmax())])
    return best


def score_vqa_files(questions: Sequence[Question], predictions: dict[str, dict], *, truncate: bool = True) -> Scored:
    """VQA accuracy in both variants and exact match of every row of answers; answer types as groups.

    Two rows of controls are added, drawn from the very answers that are asked for, so they are hard to beat:
    `majority`, the most frequent, and `majority by question type`.

    Args:
        questions: with the annotators' answers.
        predictions: by row the answer by question id; all rows have the ids of `MODEL`.
        truncate: cut answers to as many words as the longest of the annotators' has, as LiMBeR does.
    """
    kept = [question for question in questions if question.question_id in predictions[MODEL]]
    annotators = [question.answers for question in kept]
    texts = {row: [answers[question.question_id] for question in kept] for row, answers in predictions.items()}
    if truncate:
        texts = {
            row: [truncate_answer(answer, others) for answer, others in zip(answers, annotators, strict=True)]
            for row, answers in texts.items()
        }
    kinds = [question.question_type for question in kept]
    given = [answer for question in kept for answer in question.answers]
    kind_of_given = [question.question_type for question in kept for _ in question.answers]
    texts[MAJORITY] = [majority_answer(given)] * len(kept)
    texts[MAJORITY_BY_TYPE] = majority_answers(kind_of_given, given, kinds)
    scores = {
        row: {
            "VQA accuracy": vqa_accuracy(answers, annotators),
            "min(n/3, 1)": vqa_accuracy(answers, annotators, variant="simple"),
            "exact match": exact_match(answers, annotators),
        }
        for row, answers in texts.items()
    }
    groups = groups_of([question.answer_type for question in kept])
    ids, images = [question.question_id for question in kept], [question.image_id for question in kept]
    return Scored(ids, images, texts, scores, groups)


def groups_of(kinds: Sequence[str]) -> dict[str, np.ndarray]:
    kinds = np.array(kinds)
    return {str(kind): np.flatnonzero(kinds == kind) for kind in sorted(set(kinds.tolist())) if kind} | {
        ALL: np.arange(len(kinds))
    }
