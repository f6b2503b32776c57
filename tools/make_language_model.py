"""Trains the demo's language model: GPT-J's architecture, on text alone.

    python tools/make_language_model.py [--steps 1300] [--output limber_fast/data/language_model]

Its text is made from the English names, keywords, groups and genders of `limber_fast.data.emoji.concepts()`, of all
concepts: those whose drawings are held out occur too, as words do that a language model knows without having seen the
thing. No drawing is read. A line is `<words> A picture of <name>` or `<words> Q: <question> A: <answer>`; the words
before it, where a picture's soft prompts will be, are of a concept's name and keywords, many of them left out, some of
another concept's beside them: which name they mean together has to be learned, not copied.
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
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from limber_fast.data.emoji import Concept, concepts
from limber_fast.data.emoji_questions import COLOURS, QUESTIONS, answer_of
from limber_fast.training.muon import Muon

END = "<|endoftext|>"
IGNORED = -100
CAPTION = "A picture of"
MOST_WORDS = 9
KINDS = ("group", "subgroup", "colour", "gender", "tone")
Line = tuple[str, str, str]  # words, what is asked, the answer


class Corpus:
    """Endless lines: words, what is asked of them, the answer. They are encoded one by one, as behind a picture."""

    def __init__(self, seed: int):
        self.concepts, self.random = concepts(), random.Random(seed)
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

    def caption(self) -> Line:
        concept = self.random.choice(self.concepts)
        return self.words(concept), CAPTION, concept.name

    def question(self, kind: str) -> Line:
        draw, colour = self.random, None
        concept = draw.choice(self.concepts)
        if kind == "gender":
            concept = draw.choice(self.gendered[draw.choice(("female", "male"))])
        answer = answer_of(kind, concept) if kind != "colour" else (colour := draw.choice(COLOURS))
        return self.words(concept, colour), f"Q: {QUESTIONS[kind]} A:", answer

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
    texts = (f"{words}{asked} {answer}" for ((words, asked, answer),) in captions + questions)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def batches_of(documents: Sequence[Sequence[Line]], tokenizer: Tokenizer, size: int) -> list[tuple[Tensor, Tensor]]:
    """ids [size, T], padded behind, and labels [size, T], which answers and what ends them alone have; documents of
    like lengths together."""
    rows = []
    for document in documents:
        ids, labels = [], []
        for at, (words, asked, answer) in enumerate(document):
            given = tokenizer.encode(words).ids + tokenizer.encode(asked).ids
            last = at == len(document) - 1
            said = tokenizer.encode(f" {answer}" if last else f" {answer}\n").ids + [0] * last
            ids += given + said
            labels += [IGNORED] * len(given) + said
        rows.append((ids, labels))
    rows.sort(key=lambda row: len(row[0]))
    found = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        ids = torch.zeros(len(part), len(part[-1][0]), dtype=torch.int64)
        labels = torch.full_like(ids, IGNORED)
        for at, row in enumerate(part):
            ids[at, : len(row[0])], labels[at, : len(row[0])] = map(torch.tensor, row)
        found.append((ids, labels))
    return found


def loss_of(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """The sum of the labelled tokens' cross entropies; the head sees no others."""
    hidden, labels = model.transformer(ids).last_hidden_state[:, :-1], labels[:, 1:]
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
        labelled = sum(int((labels != IGNORED).sum()) for _, labels in parts)
        model.zero_grad()
        total = 0.0
        for ids, labels in parts:
            loss = loss_of(model, ids, labels) / labelled
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
        "name and two keywords": [(" " + " ".join([c.name, *c.tags[:2]]), CAPTION, c.name) for c in some],
        "keywords alone": [(" " + " ".join(draw.sample(c.tags, 3)), CAPTION, c.name) for c in some],
        **{kind: [corpus.question(kind) for _ in range(lines // 2)] for kind in KINDS},
    }
    found = {}
    for name, given in asked.items():
        prompts = [tokenizer(words).input_ids + tokenizer(question).input_ids for words, question, _ in given]
        texts = []
        for start in range(0, len(prompts), 100):
            texts += model.generate(prompts[start : start + 100], max_new_tokens=16, tokenizer=tokenizer).texts
        right = [text.strip() == answer for text, (_, _, answer) in zip(texts, given, strict=True)]
        found[name] = round(100 * sum(right) / len(right), 1)
    return {"told in words, percent exact": found}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("limber_fast/data/language_model"))
    for name, value in (("steps", 1300), ("vocabulary", 4096), ("width", 192), ("layers", 3), ("heads", 4),
                        ("context", 192), ("batch", 64), ("seed", 0), ("threads", 1)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value, help="default: %(default)s")
    for name, value in (("learning-rate", 3e-3), ("muon-learning-rate", 0.02), ("dropout", 0.1)):
        parser.add_argument(f"--{name}", type=float, default=value, help="default: %(default)s")
    train(parser.parse_args())
