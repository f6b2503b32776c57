"""Trains the demo's language model: GPT-J's architecture, on text alone.

    python tools/make_language_model.py [--seconds 300] [--output limber_fast/data/language_model]

Its text is made from the English names, keywords, groups and genders of `limber_fast.data.emoji.concepts()`, of all
concepts: those whose drawings are held out occur too, as words do that a language model knows without having seen the
thing. No drawing is read. A line is `<words> A picture of <name>` or `<words> Q: <question> A: <answer>`; the words
before it, where a picture's soft prompts will be, are of a concept's name and keywords, some of them left out.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

from limber_fast.data.emoji import Concept, concepts
from limber_fast.data.emoji_questions import COLOURS, QUESTIONS, answer_of
from limber_fast.training.muon import Muon

END = "<|endoftext|>"
CONTEXT = 192


class Corpus:
    """Endless text. `line()` gives its parts, which are encoded one by one, as a prompt's are behind a picture."""

    def __init__(self, seed: int):
        self.concepts, self.random = concepts(), random.Random(seed)
        self.by_answer: dict[str, list[Concept]] = {}
        for concept in self.concepts:
            for kind in ("group", "gender", "tone"):
                self.by_answer.setdefault(f"{kind} {answer_of(kind, concept)}", []).append(concept)

    def words(self, concept: Concept, colour: str | None = None) -> str:
        """The name and up to three keywords, in any order; sometimes keywords alone."""
        draw = self.random
        found = [concept.name] if draw.random() < 0.8 else []
        found += draw.sample(concept.tags, min(len(concept.tags), draw.randint(0, 3)))
        found = found or [concept.name]
        if colour is not None:
            found.append(colour)
        draw.shuffle(found)
        return " " + " ".join(found)

    def caption(self) -> list[str]:
        concept = self.random.choice(self.concepts)
        return [self.words(concept), f"A picture of {concept.name}"]

    def question(self, kind: str) -> list[str]:
        draw = self.random
        if kind == "colour":
            concept, answer = draw.choice(self.concepts), draw.choice(COLOURS)
            return [self.words(concept, answer), f"Q: {QUESTIONS[kind]} A: {answer}"]
        while True:
            concept = draw.choice(self.concepts)
            if kind == "gender" and not concept.gender:
                concept = draw.choice(self.by_answer[f"gender {draw.choice(('woman', 'man'))}"])
            return [self.words(concept), f"Q: {QUESTIONS[kind]} A: {answer_of(kind, concept)}"]

    def document(self) -> list[list[str]]:
        """A caption, or one to five questions of a kind."""
        if self.random.random() < 0.5:
            return [self.caption()]
        kind = self.random.choice(("group", "group", "subgroup", "subgroup", "colour", "gender", "tone"))
        return [self.question(kind) for _ in range(self.random.choice((1, 1, 2, 3, 5)))]


def make_tokenizer(corpus: Corpus, vocabulary: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    texts = ("".join(part) for _ in range(20_000) for line in corpus.document() for part in line)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class Stream:
    """Rows of token ids: documents one after another, each closed by the end of text."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer):
        self.corpus, self.tokenizer, self.waiting = corpus, tokenizer, []

    def rows(self, count: int, length: int) -> torch.Tensor:
        while len(self.waiting) < count * length:
            document = self.corpus.document()
            parts = [part for line in document for part in (*line, "\n")][:-1]
            if len(document) > 1:
                parts.append("\n")
            for encoded in self.tokenizer.encode_batch(parts, add_special_tokens=False):
                self.waiting += encoded.ids
            self.waiting.append(0)
        taken, self.waiting = self.waiting[: count * length], self.waiting[count * length :]
        return torch.tensor(taken).view(count, length)


def train(args: argparse.Namespace) -> None:
    from transformers import GPTJConfig, GPTJForCausalLM

    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    tokenizer = make_tokenizer(Corpus(args.seed), args.vocabulary)
    config = GPTJConfig(
        vocab_size=tokenizer.get_vocab_size(), n_positions=CONTEXT, n_embd=args.width, n_layer=args.layers,
        n_head=args.heads, rotary_dim=16, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
    )  # fmt: skip
    model = GPTJForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    hidden = [p for name, p in model.named_parameters() if ".h." in name and p.ndim == 2]
    chosen = {id(p) for p in hidden}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [
        Muon(hidden, args.muon_learning_rate),
        torch.optim.AdamW(others, args.learning_rate, (0.9, 0.97), weight_decay=0.0, fused=True),
    ]
    stream, step, tokens = Stream(Corpus(args.seed + 1), tokenizer), 0, 0
    start, began, said = time.monotonic(), time.process_time(), 0.0
    while (fraction := (time.monotonic() - start) / args.seconds) < 1:
        rows = stream.rows(args.batch, args.length)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(rows).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = min(1.0, (step + 1) / 20) * min(1.0, (1 - fraction) / 0.5)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * optimizer.defaults["lr"]
            optimizer.step()
        step, tokens = step + 1, tokens + rows.numel()
        if not math.isfinite(loss.item()):
            raise SystemExit(f"the loss is {loss.item()} at step {step}")
        if (spent := time.process_time() - began) > said + 10:
            said = spent
            print(f"step {step}, {said:.0f} CPU-s, {tokens:,} tokens, loss {loss.item():.3f}", flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(args.output, safe_serialization=True)
    (args.output / "generation_config.json").unlink(missing_ok=True)
    tokenizer.save(str(args.output / "tokenizer.json"))
    print(f"{step} steps, {tokens:,} tokens, last loss {loss.item():.3f}: {args.output}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300.0, help="of wall time (default: %(default)g)")
    parser.add_argument("--output", type=Path, default=Path("limber_fast/data/language_model"))
    for name, value in (("vocabulary", 1536), ("width", 192), ("layers", 4), ("heads", 4), ("batch", 16),
                        ("length", 96), ("seed", 0), ("threads", 1)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value, help="default: %(default)s")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--muon-learning-rate", type=float, default=0.02)
    train(parser.parse_args())
