"""The text that the demo's language model learns: endless lines about emoji, as tokens and as blurred embeddings."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from limber_fast.data.emoji import Concept, concepts
from limber_fast.data.emoji_questions import COLOURS, QUESTIONS, answer_of
from limber_fast.training.projection import PROMPT, SOFT_PROMPTS, soft_tokens

END = "<|endoftext|>"
IGNORED = -100
MOST_WORDS = 9
KINDS = ("group", "subgroup", "colour", "gender", "tone")
BLURRED = 0.6  # of the lines
OTHERS = 12  # names added to a blurred one
LOUDEST = 4.0  # their length together, in that of the name


class Line(NamedTuple):
    """Words, what is asked of them, the answer. `blur`: (name, weight) of all that stands in the words' place."""

    words: str
    asked: str
    answer: str
    blur: tuple[tuple[str, float], ...] = ()


class Blur(NamedTuple):
    """Of a batch: flat places [P] of blurred embeddings, the token of the name at each; and [R] times weight * token
    added at a place (its index in `places`)."""

    places: Tensor
    named: Tensor
    at: Tensor
    tokens: Tensor
    weights: Tensor


class Corpus:
    """Endless lines: words, what is asked of them, the answer. They are encoded one by one, as behind a picture."""

    def __init__(self, seed: int):
        self.concepts, self.random = concepts(), random.Random(seed)
        self.siblings = {c.subgroup: [x for x in self.concepts if x.subgroup == c.subgroup] for c in self.concepts}
        self.gendered = {gender: [c for c in self.concepts if c.gender == gender] for gender in ("female", "male")}

    def words(self, concept: Concept, colour: str | None = None) -> str:
        """Some words of the name and up to five keywords, in any order."""
        draw = self.random
        found = [concept.name] if draw.random() < 0.6 else []
        found += draw.sample(concept.tags, min(len(concept.tags), draw.randint(0 if found else 2, 5)))
        found = found or [concept.name]
        if draw.random() < 0.15:
            found.append(concept.subgroup.replace("-", " "))
        if colour is not None:
            found.append(colour)
        if draw.random() < 0.15:
            found.append(draw.choice(draw.choice(self.concepts).tags or (concept.name,)))
        draw.shuffle(found)
        words = " ".join(found).split()
        if colour is None and draw.random() < 0.5:
            words = [word for word in words if draw.random() < 0.75] or words
        return " " + " ".join(words[:MOST_WORDS])

    def blur(self, concept: Concept) -> tuple[tuple[str, float], ...]:
        """The concept's name and others', one of them perhaps of its subgroup; weights of unit length together."""
        draw = self.random
        if draw.random() >= BLURRED:
            return ()
        loud = draw.uniform(0, LOUDEST) / math.sqrt(OTHERS)
        found = [(concept.name, 1.0)] + [(draw.choice(self.concepts).name, draw.gauss(0, loud)) for _ in range(OTHERS)]
        siblings = self.siblings[concept.subgroup]
        if draw.random() < 0.5:
            found.append((draw.choice(siblings).name, draw.uniform(0, 0.8)))
        scale = draw.uniform(0.7, 1.4) / math.sqrt(sum(weight**2 for _, weight in found))
        return tuple((name, scale * weight) for name, weight in found)

    def caption(self) -> Line:
        concept = self.random.choice(self.concepts)
        return Line(self.words(concept), PROMPT, concept.name, self.blur(concept))

    def question(self, kind: str) -> Line:
        draw, colour = self.random, None
        concept = draw.choice(self.concepts)
        if kind == "gender":
            concept = draw.choice(self.gendered[draw.choice(("female", "male"))])
        answer = answer_of(kind, concept) if kind != "colour" else (colour := draw.choice(COLOURS))
        blur = self.blur(concept) if colour is None else ()
        return Line(self.words(concept, colour), f"Q: {QUESTIONS[kind]} A:", answer, blur)

    def documents(self, captions: int, questions: int, shots: int) -> tuple[list[list[Line]], ...]:
        """Captions, questions, and `shots` times two to five questions of a kind after each other."""
        draw, shown = self.random, []
        for _ in range(shots):
            kind = draw.choice(KINDS)
            shown.append([self.question(kind) for _ in range(draw.choice((2, 3, 5)))])
        asked = [[self.question(draw.choice(KINDS))] for _ in range(questions)]
        return [[self.caption()] for _ in range(captions)], asked, shown


def make_tokenizer(corpus: Corpus, vocabulary: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    captions, questions, _ = corpus.documents(15_000, 5_000, 0)
    texts = (f"{line.words}{line.asked} {line.answer}" for (line,) in captions + questions)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def name_tokens(tokenizer: Tokenizer, name: str) -> list[int]:
    """What stands in the words' place for a name, as in the least squares that the demo's map starts from."""
    return soft_tokens(tokenizer.encode(f" {name}").ids)


def batches_of(
    documents: Sequence[Sequence[Line]], tokenizer: Tokenizer, size: int
) -> list[tuple[Tensor, Tensor, Blur]]:
    """ids [size, T], padded behind, labels [size, T], which answers and what ends them alone have, and what is blurred;
    documents of like lengths together."""
    rows = []
    for document in documents:
        ids, labels, blurred = [], [], []
        for at, line in enumerate(document):
            words = tokenizer.encode(line.words).ids
            if line.blur:
                words = name_tokens(tokenizer, line.blur[0][0])
                blurred.append((len(ids), line.blur))
            given = words + tokenizer.encode(line.asked).ids
            last = at == len(document) - 1
            said = tokenizer.encode(f" {line.answer}" if last else f" {line.answer}\n").ids + [0] * last
            ids += given + said
            labels += [IGNORED] * len(given) + said
        rows.append((ids, labels, blurred))
    rows.sort(key=lambda row: len(row[0]))
    found = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        ids = torch.zeros(len(part), len(part[-1][0]), dtype=torch.int64)
        labels = torch.full_like(ids, IGNORED)
        places, named, added = [], [], []
        for at, (row, labelled, blurred) in enumerate(part):
            ids[at, : len(row)], labels[at, : len(row)] = torch.tensor(row), torch.tensor(labelled)
            for start, blur in blurred:
                for name, weight in blur:
                    tokens = name_tokens(tokenizer, name)
                    added += [(len(places) + j, token, weight) for j, token in enumerate(tokens)]
                places += [at * ids.shape[1] + start + j for j in range(SOFT_PROMPTS)]
                named += row[start : start + SOFT_PROMPTS]
        at, tokens, weights = zip(*added, strict=True) if added else ((), (), ())
        index = [torch.tensor(x, dtype=torch.int64) for x in (places, named, at, tokens)]
        found.append((ids, labels, Blur(*index, torch.tensor(weights, dtype=torch.float32))))
    return found
