"""Trains the demo's language model: GPT-J's architecture, on text alone.

    python tools/make_language_model.py [--steps 2600] [--output limber_fast/data/language_model]

Its text is made from the English names, keywords, groups and genders of `limber_fast.data.emoji.concepts()`, of all
concepts: those whose drawings are held out occur too, as words do that a language model knows without having seen the
thing. No drawing is read. A line is `<words> A picture of <name>` or `<words> Q: <question> A: <answer>`; the words
before it, where a picture's soft prompts will be, are of a concept's name and keywords, many of them left out, some of
another concept's beside them: which name they mean together has to be learned, not copied. Most lines are
blurred: in the place of the words stand the first tokens of the name, as many as a picture has soft prompts, each
embedding with those of other concepts' names added to it, together up to four times as large. That is what a linear map
makes of a picture of which it is not sure.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import tempfile
import time
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from limber_fast.data.emoji import Concept, concepts
from limber_fast.data.emoji_questions import COLOURS, QUESTIONS, answer_of
from limber_fast.training.muon import Muon
from limber_fast.training.projection import SOFT_PROMPTS

END = "<|endoftext|>"
IGNORED = -100
CAPTION = "A picture of"
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
        return Line(self.words(concept), CAPTION, concept.name, self.blur(concept))

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


def soft_tokens(tokenizer: Tokenizer, name: str) -> list[int]:
    """The name's tokens, as many as there are soft prompts, beginning anew behind the last."""
    return list(islice(cycle(tokenizer.encode(f" {name}").ids), SOFT_PROMPTS))


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
                words = soft_tokens(tokenizer, line.blur[0][0])
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
                    tokens = soft_tokens(tokenizer, name)
                    added += [(len(places) + j, token, weight) for j, token in enumerate(tokens)]
                places += [at * ids.shape[1] + start + j for j in range(SOFT_PROMPTS)]
                named += row[start : start + SOFT_PROMPTS]
        at, tokens, weights = zip(*added, strict=True) if added else ((), (), ())
        index = [torch.tensor(x, dtype=torch.int64) for x in (places, named, at, tokens)]
        found.append((ids, labels, Blur(*index, torch.tensor(weights, dtype=torch.float32))))
    return found


def embedded(model: nn.Module, ids: Tensor, blur: Blur) -> Tensor:
    """Embeddings [size, T, E]; a blurred one is the mean of all names' and the weighted sum of what differs from it."""
    x = model.transformer.wte(ids)
    if not len(blur.places):
        return x
    centre = model.transformer.wte(blur.named).mean(0).detach()
    added = blur.weights[:, None] * (model.transformer.wte(blur.tokens) - centre)
    mixed = centre.expand(len(blur.places), -1).index_add(0, blur.at, added)
    return x.flatten(0, 1).index_copy(0, blur.places, mixed).view_as(x)


def loss_of(model: nn.Module, ids: Tensor, labels: Tensor, blur: Blur) -> Tensor:
    """The sum of the labelled tokens' cross entropies; the head sees no others."""
    hidden = model.transformer(inputs_embeds=embedded(model, ids, blur)).last_hidden_state[:, :-1]
    labels = labels[:, 1:]
    labelled = labels != IGNORED
    logits = model.lm_head(hidden[labelled]).float()
    return nn.functional.cross_entropy(logits, labels[labelled], reduction="sum")


def new_model(args: argparse.Namespace, vocabulary: int) -> nn.Module:
    from transformers import GPTJConfig, GPTJForCausalLM

    config = GPTJConfig(
        vocab_size=vocabulary, n_positions=args.context, n_embd=args.width, n_layer=args.layers, n_head=args.heads,
        rotary_dim=16, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False, resid_pdrop=0.0,
        embd_pdrop=args.dropout, attn_pdrop=0.0, use_cache=False,
    )  # fmt: skip
    model = GPTJForCausalLM(config)
    for block in model.transformer.h:
        block.mlp.act = nn.GELU(approximate="tanh")  # gelu_new in one pass over memory
    return model


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    tokenizer = make_tokenizer(Corpus(args.seed), args.vocabulary)
    model = new_model(args, tokenizer.get_vocab_size()).train()
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    hidden = [p for name, p in model.named_parameters() if ".h." in name and p.ndim == 2]
    chosen = {id(p) for p in hidden}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [
        Muon(hidden, args.muon_learning_rate),
        torch.optim.AdamW(others, args.learning_rate, (0.9, 0.97), weight_decay=0.0, fused=True),
    ]
    corpus, tokens, mean, began, said = Corpus(args.seed + 1), 0, None, time.process_time(), 0.0
    for step in range(args.steps):
        parts = []
        for documents in corpus.documents(args.batch * 5 // 8, args.batch * 5 // 16, args.batch // 16):
            parts += batches_of(documents, tokenizer, (len(documents) + 3) // 4)
        labelled = sum(int((labels != IGNORED).sum()) for _, labels, _ in parts)
        model.zero_grad()
        total = 0.0
        for ids, labels, blur in parts:
            loss = loss_of(model, ids, labels, blur) / labelled
            loss.backward()
            total += loss.item()
            tokens += ids.numel()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = min(1.0, (step + 1) / 50, (1 - step / args.steps) / 0.4)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * optimizer.defaults["lr"]
            optimizer.step()
        if not math.isfinite(total):
            raise SystemExit(f"the loss is {total} at step {step}")
        mean = total if mean is None else 0.98 * mean + 0.02 * total
        if (spent := time.process_time() - began) > said + 10:
            said = spent
            print(f"step {step}, {said:.0f} CPU-s, {tokens:,} tokens, loss {mean:.3f}", flush=True)
        if step % 500 == 499:
            save(model, tokenizer, args.output)
    save(model, tokenizer, args.output)
    facts = {"steps": args.steps, "tokens": tokens, "cpu_seconds": round(spent), "loss": round(mean, 3)}
    facts |= told_in_words(args.output)
    (args.output / "metrics.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(facts, flush=True)


def save(model: nn.Module, tokenizer: Tokenizer, folder: Path) -> None:
    """Head and blocks in int8, embeddings in fp16, as the demo runs them."""
    from limber_fast import GPTJ

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        copy.deepcopy(model).half().save_pretrained(temporary)
        GPTJ.from_pretrained(temporary).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))


def told_in_words(folder: Path, lines: int = 1000) -> dict[str, dict[str, float]]:
    """Percent of new lines of text that the saved model answers exactly: without noise, with name and two keywords or
    with keywords alone, and of each kind of question."""
    from limber_fast.models.small_language_model import small_language_model

    model, tokenizer = small_language_model(folder)
    corpus = Corpus(10_000)
    draw = corpus.random
    some = [draw.choice([c for c in corpus.concepts if len(c.tags) >= 3]) for _ in range(lines)]
    asked = {
        "name and two keywords": [Line(" " + " ".join([c.name, *c.tags[:2]]), CAPTION, c.name) for c in some],
        "keywords alone": [Line(" " + " ".join(draw.sample(c.tags, 3)), CAPTION, c.name) for c in some],
        **{kind: [corpus.question(kind) for _ in range(lines // 2)] for kind in KINDS},
    }
    found = {}
    for name, given in asked.items():
        prompts = [tokenizer(line.words).input_ids + tokenizer(line.asked).input_ids for line in given]
        texts = []
        for start in range(0, len(prompts), 100):
            texts += model.generate(prompts[start : start + 100], max_new_tokens=16, tokenizer=tokenizer).texts
        right = [text.strip() == line.answer for text, line in zip(texts, given, strict=True)]
        found[name] = round(100 * sum(right) / len(right), 1)
    return {"told in words, percent exact": found}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("limber_fast/data/language_model"))
    for name, value in (("steps", 2600), ("vocabulary", 4096), ("width", 192), ("layers", 3), ("heads", 4),
                        ("context", 192), ("batch", 64), ("seed", 0), ("threads", 1)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value, help="default: %(default)s")
    for name, value in (("learning-rate", 3e-3), ("muon-learning-rate", 0.02), ("dropout", 0.1)):
        parser.add_argument(f"--{name}", type=float, default=value, help="default: %(default)s")
    train(parser.parse_args())
