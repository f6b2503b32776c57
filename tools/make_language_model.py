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
import tempfile
import time
from pathlib import Path

import torch
from language_model_text import IGNORED, KINDS, Blur, Corpus, Line, batches_of, make_tokenizer
from tokenizers import Tokenizer
from torch import Tensor, nn

from limber_fast.training.muon import Muon
from limber_fast.training.projection import PROMPT


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
        "name and two keywords": [Line(" " + " ".join([c.name, *c.tags[:2]]), PROMPT, c.name) for c in some],
        "keywords alone": [Line(" " + " ".join(draw.sample(c.tags, 3)), PROMPT, c.name) for c in some],
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
