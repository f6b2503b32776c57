"""LiMBeR on emoji: captions and visual questions about drawings by a vendor never trained on."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limber_fast.data.emoji import concepts
from limber_fast.data.emoji_questions import QUESTIONS, answer_of
from limber_fast.evaluation.bootstrap import bootstrap_interval
from limber_fast.evaluation.cider import cider_d
from limber_fast.evaluation.clip_score import score_captions
from limber_fast.evaluation.controls import derangement, majority_answer
from limber_fast.evaluation.exact_match import exact_match
from limber_fast.models.clip import SmallClip
from limber_fast.models.gptj import GPTJ
from limber_fast.models.limber import Limber
from limber_fast.models.tokenizer import WordTokenizer
from limber_fast.training.drawings import Drawings
from limber_fast.training.projection import PROMPT, spread

SHOTS = (0, 1, 2, 4)
ASKED = 200  # questions of a kind
BATCH = 128
Progress = Callable[[int], None]
TextScorer = tuple[SmallClip, WordTokenizer]  # a CLIP that is no captioner's encoder
PREFIX = "a drawing of "  # one of the scorer's own templates, in the place of CLIPScore's 'A photo depicts '


@dataclass(frozen=True)
class Asked:
    """Questions of one kind: rows of the test drawings, their answers, shots (row of a training drawing, answer)."""

    kind: str
    rows: list[int]
    answers: list[str]
    shots: list[tuple[int, str]]
    majority: str


@dataclass
class Row:
    """What was said of every test drawing and question, and its scores: `vqa[kind][shots]` of every question, the
    others of every drawing, percent. CLIPScores are empty without a scorer."""

    name: str
    captions: list[str] = field(default_factory=list)
    answers: dict[str, dict[int, list[str]]] = field(default_factory=dict)
    cider: np.ndarray = field(default_factory=lambda: np.zeros(0))
    exact: np.ndarray = field(default_factory=lambda: np.zeros(0))
    vqa: dict[str, dict[int, np.ndarray]] = field(default_factory=dict)
    clip_score: np.ndarray = field(default_factory=lambda: np.zeros(0))
    ref_clip_score: np.ndarray = field(default_factory=lambda: np.zeros(0))


class Benchmark:
    """The captions and questions of a test, the same for every encoder.

    Args: train, test: drawings; the questions are of drawn test rows, the shots of drawn training rows.
    """

    def __init__(self, train: Drawings, test: Drawings, seed: int = 0, asked: int = ASKED):
        known = concepts()
        self.train, self.test = train, test
        self.drawn = [known[i] for i in test.concept.tolist()]
        self.references = [list(concept.names) for concept in self.drawn]
        self.seen = torch.isin(test.concept, train.concept).numpy()
        self.ceiling = float(100 * cider_d([c.name for c in self.drawn], self.references).mean())
        self.asked = [self._ask(kind, seed, asked) for kind in QUESTIONS]

    def _ask(self, kind: str, seed: int, count: int) -> Asked:
        draw = random.Random(f"{seed} {kind}")
        rows, answers = self._answered(kind, self.test, draw, count)
        shown, told = self._answered(kind, self.train, draw, 1000)
        return Asked(kind, rows, answers, list(zip(shown, told, strict=True))[: SHOTS[-1]], majority_answer(told))

    @staticmethod
    def _answered(kind: str, drawings: Drawings, draw: random.Random, count: int) -> tuple[list[int], list[str]]:
        known, rows, answers = concepts(), [], []
        for row in draw.sample(range(len(drawings)), len(drawings)):
            image = drawings.images[row].permute(1, 2, 0).numpy() if kind == "colour" else None
            answer = answer_of(kind, known[int(drawings.concept[row])], image)
            if answer is not None and (kind != "tone" or answers.count(answer) < count // 2):  # as many yes as no
                rows.append(row)
                answers.append(answer)
            if len(rows) == count:
                break
        return rows, answers

    def score(self, row: Row, scorer: TextScorer | None = None) -> Row:
        """Fills the scores of what `row` said."""
        row.cider = 100 * cider_d(row.captions, self.references)
        row.exact = 100 * exact_match(row.captions, self.references)
        row.vqa = {
            asked.kind: {
                shots: 100 * exact_match(said, [[answer] for answer in asked.answers])
                for shots, said in row.answers[asked.kind].items()
            }
            for asked in self.asked
        }
        if scorer is not None:
            model, tokenizer = scorer
            scores = score_captions(
                model, self.test.images, row.captions, self.references, preprocess=lambda image: image.float() / 255,
                tokenize=tokenizer, prefix=PREFIX, batch=512,
            )  # fmt: skip
            row.clip_score, row.ref_clip_score = 100 * scores.clip_score, 100 * scores.ref_clip_score
        return row

    def run(
        self, name: str, limber: Limber, train: Tensor, test: Tensor, progress: Progress = lambda done: None
    ) -> Row:
        """Captions and answers of `limber`.

        Args: train [R, D], test [N, D]: standardised features of all drawings. progress: called with the steps done,
        of `steps`.
        """
        row, done = Row(name), 0
        row.captions = limber.caption(spread(test), PROMPT, max_new_tokens=16, batch_size=BATCH)
        progress(done := done + 1)
        for asked in self.asked:
            question, images = QUESTIONS[asked.kind], spread(test[asked.rows])
            row.answers[asked.kind] = {}
            for count in SHOTS:
                shown = asked.shots[:count]
                soft = spread(train[[r for r, _ in shown]]) if shown else []
                shots = [(f, question, answer) for f, (_, answer) in zip(soft, shown, strict=True)]
                row.answers[asked.kind][count] = limber.answer(
                    images, [question] * len(images), shots, max_new_tokens=8, batch_size=BATCH
                )
                progress(done := done + 1)
        return row

    @property
    def steps(self) -> int:
        return 1 + len(self.asked) * len(SHOTS)

    def oracle(self, language_model: GPTJ, tokenizer: Any) -> Row:
        """The language model alone, told name and keywords in words where the picture's soft prompts would be: what is
        lost here no encoder can win. 0 shots."""
        told = [" " + " ".join([c.name, *c.tags[:2]]) for c in self.drawn]

        def say(rows: list[int], text: str, tokens: int) -> list[str]:
            said: list[str] = []
            for start in range(0, len(rows), BATCH):
                prompts = [
                    tokenizer(told[r]).input_ids + tokenizer(text).input_ids for r in rows[start : start + BATCH]
                ]
                found = language_model.generate(prompts, max_new_tokens=tokens, stop_strings="\n", tokenizer=tokenizer)
                said += [text.strip() for text in found.texts]
            return said

        row = Row("told in words")
        row.captions = say(list(range(len(told))), PROMPT, 16)
        row.answers = {a.kind: {0: say(a.rows, f"Q: {QUESTIONS[a.kind]} A:", 8)} for a in self.asked}
        return row

    def majority(self) -> Row:
        """The training drawings' most frequent answer to each kind of question."""
        row = Row("most frequent answer")
        names = [concepts()[i].name for i in self.train.concept.tolist()]
        row.captions = [majority_answer(names)] * len(self.drawn)
        row.answers = {a.kind: {0: [a.majority] * len(a.rows)} for a in self.asked}
        return row


def shuffled(features: Tensor, seed: int = 0) -> Tensor:
    """Every drawing's features given to another one."""
    return features[derangement(len(features), seed)]


def summary(row: Row, benchmark: Benchmark) -> dict:
    """Means with their 95% intervals over drawings, percent; CIDEr-D times 100."""

    def interval(scores: np.ndarray) -> dict[str, float]:
        return bootstrap_interval(scores, resamples=2000)._asdict()

    return {
        "cider_d": interval(row.cider),
        "clip_score": interval(row.clip_score) if len(row.clip_score) else None,
        "ref_clip_score": interval(row.ref_clip_score) if len(row.ref_clip_score) else None,
        "name_seen": interval(row.exact[benchmark.seen]),
        "name_unseen": interval(row.exact[~benchmark.seen]) if not benchmark.seen.all() else None,
        "vqa": {
            kind: {str(shots): interval(scores) for shots, scores in by_shots.items()}
            for kind, by_shots in row.vqa.items()
        },
    }
