"""Generation: prompts in many forms to packed rows, choosing tokens, and what ends a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from limber_fast import checks
from limber_fast.models.gptj_config import GPTJConfig

_OP = "GPTJ.generate"
NUCLEUS = 256
OnToken = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Generation:
    """What was generated, per prompt.

    Attributes:
        tokens: the new ids, with the end-of-text id or the tokens of the stop string that ended them.
        texts: the same as text, without end of text and without the stop string; None where no tokenizer was given.
        stopped: 'eos', 'stop_string', 'repetition' or 'length' (max_new_tokens).
    """

    tokens: list[list[int]]
    texts: list[str] | None
    stopped: list[str]


@dataclass(frozen=True)
class Sampler:
    """Chooses one token a row: the most likely one at temperature 0, otherwise one drawn after top_k and top_p.

    Row r draws from a generator of its own, of seed + r: what it says does not depend on the rows beside it.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    nucleus_first: bool = False  # top_p of the probabilities before the temperature

    def check(self) -> None:
        checks.not_negative(_OP, "temperature", self.temperature)
        if self.top_k is not None:
            checks.size(_OP, "top_k", self.top_k)
        if self.top_p is not None:
            checks.real(_OP, "top_p", self.top_p)
            if not 0 < self.top_p <= 1:
                raise checks.invalid(_OP, "top_p", "lie within (0, 1]", repr(self.top_p))
        if self.temperature == 0 and (self.top_k or self.top_p):
            given = "top_k" if self.top_k else "top_p"
            raise checks.invalid(_OP, given, "go with a temperature", "temperature 0, which is greedy", "set one")

    def __call__(self, logits: Tensor, generators: Sequence[torch.Generator]) -> list[int]:
        """logits: [B, V] fp32."""
        if self.temperature == 0:
            return logits.argmax(-1).tolist()
        scores, ids = logits.double(), None
        highest = scores.amax(-1, keepdim=True)

        def weights(scores: Tensor, temperature: float = self.temperature) -> Tensor:
            return ((scores - highest) / temperature).exp()

        measured = 1.0 if self.nucleus_first else self.temperature  # the temperature of top_p's probabilities
        if self.top_k is not None:
            scores, ids = scores.topk(min(self.top_k, scores.shape[-1]))  # in falling order
            total = weights(scores, measured).sum(-1, keepdim=True)
        elif self.top_p is not None:
            # All of GPT-J's vocabulary in order takes 2.8 ms a row, the first 256 tokens, mostly enough, 0.14 ms.
            total = weights(scores, measured).sum(-1, keepdim=True)
            first, ids = scores.topk(min(NUCLEUS, scores.shape[-1]))
            enough = weights(first, measured).sum(-1, keepdim=True) >= self.top_p * total
            scores, ids = (first, ids) if bool(enough.all()) else scores.sort(descending=True)
        cumulative = weights(scores).cumsum(-1)
        end = cumulative[:, -1:]
        if self.top_p is not None:  # up to the first token that reaches p
            last = torch.searchsorted(weights(scores, measured).cumsum(-1), self.top_p * total)
            end = cumulative.gather(-1, last.clamp(max=scores.shape[-1] - 1))
        u = torch.cat([torch.rand(1, dtype=torch.float64, device=g.device, generator=g) for g in generators])
        drawn = torch.searchsorted(cumulative, u[:, None] * end, right=True).clamp(max=scores.shape[-1] - 1)
        return (drawn if ids is None else ids.gather(-1, drawn)).flatten().tolist()


@dataclass(frozen=True)
class Stopping:
    """What ends a text beside max_new_tokens."""

    eos: tuple[int, ...] = ()
    strings: tuple[str, ...] = ()
    repetition: int | None = None
    tokenizer: Any = None

    def check(self) -> None:
        if not all(isinstance(x, str) and x for x in self.strings):
            raise checks.invalid(_OP, "stop_strings", "be texts, none of them empty", repr(self.strings))
        if self.strings and self.tokenizer is None:
            raise checks.invalid(_OP, "tokenizer", "be given with stop_strings", "None")
        if self.repetition is not None and not (isinstance(self.repetition, int) and self.repetition >= 2):
            raise checks.invalid(_OP, "repetition_stop", "be a whole number of at least 2", repr(self.repetition))

    def repeats(self, tokens: list[int]) -> bool:
        """Whether `tokens` end in one phrase, of whatever length, `repetition` times in a row."""
        times = self.repetition
        return times is not None and any(
            tokens[-p * (times - 1) :] == tokens[-p * times : -p] for p in range(1, len(tokens) // times + 1)
        )


class Row:
    """One text while it grows."""

    def __init__(self, stopping: Stopping) -> None:
        self.stopping, self.tokens, self.text, self.sent, self.stopped = stopping, [], "", 0, ""

    def add(self, token: int, last: bool) -> str:
        """Takes a token; returns the text that is now certain: it ends in no half character and no half stop string."""
        how = self.stopping
        self.tokens.append(token)
        if token in how.eos:
            self.stopped = "eos"
        elif how.repeats(self.tokens):
            self.stopped = "repetition"
        elif last:
            self.stopped = "length"
        if how.tokenizer is None:
            return ""
        said = self.tokens[:-1] if self.stopped == "eos" else self.tokens
        self.text = how.tokenizer.decode(said, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        found = [at for at in map(self.text.find, how.strings) if at >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], "stop_string"
        certain = len(self.text) if self.stopped else self._certain()
        piece, self.sent = self.text[self.sent : certain], max(self.sent, certain)
        return piece

    def _certain(self) -> int:
        text = self.text.rstrip("\ufffd")  # what a decoder gives for the beginning of a character
        held = max((n for x in self.stopping.strings for n in range(1, len(x)) if text.endswith(x[:n])), default=0)
        return len(text) - held


def packed_prompts(
    model: Any, input_ids: Any, inputs_embeds: Any, attention_mask: Tensor | None, tokenizer: Any
) -> tuple[Tensor, list[int], list[list[int]]]:
    """Prompts of any form as rows [T, E], one after another, the length of each, and its ids, if it has any."""
    checks.exactly_one(_OP, input_ids=input_ids, inputs_embeds=inputs_embeds)
    name, prompts = ("input_ids", input_ids) if inputs_embeds is None else ("inputs_embeds", inputs_embeds)
    if isinstance(prompts, str) or (name == "input_ids" and _all(prompts, int)):
        prompts = [prompts]
    if _all(prompts, str):
        if tokenizer is None:
            raise checks.invalid(_OP, "tokenizer", "be given with prompts of text", "None")
        prompts = [tokenizer(text).input_ids for text in prompts]
    if isinstance(prompts, Tensor):
        checks.whole_rows(_OP, name, prompts, "[B, S]" if name == "input_ids" else "[B, S, E]", model.wte)
        rows = list(prompts)
        if attention_mask is not None:
            checks.beside(_OP, "attention_mask", attention_mask, prompts.shape[:2], model.wte)
            rows = [row[kept != 0] for row, kept in zip(rows, attention_mask, strict=True)]
            checks.no_empty_row(_OP, "attention_mask", [len(row) for row in rows])
    elif isinstance(prompts, Sequence) and prompts:
        if attention_mask is not None:
            raise checks.invalid(_OP, "attention_mask", "go with a tensor of prompts", "a list", "leave padding out")
        shape = "[S]" if name == "input_ids" else "[S, E]"
        rows = [x if isinstance(x, Tensor) else torch.as_tensor(x, device=model.device) for x in prompts]
        for row in rows:
            checks.whole_rows(_OP, f"every prompt of {name}", row, shape, model.wte)
    else:
        raise checks.invalid(_OP, name, "be prompts", checks.kind_of(prompts), kind=TypeError)
    x = torch.cat(rows)
    if name == "input_ids":
        return model.embed(x), [len(row) for row in rows], [row.tolist() for row in rows]
    checks.embeddings(_OP, name, x, model.config.n_embd)
    return x.to(model.dtype), [len(row) for row in rows], [[]] * len(rows)


def _all(prompts: Any, kind: type) -> bool:
    return isinstance(prompts, (list, tuple)) and bool(prompts) and all(isinstance(x, kind) for x in prompts)


def check_room(lengths: list[int], max_new_tokens: int, limit: int, before: int = 0) -> None:
    checks.size(_OP, "max_new_tokens", max_new_tokens)
    longest = before + max(lengths)
    if longest + max_new_tokens > limit:
        contract = f"fit behind the prompts within n_positions = {limit}"
        found = f"{max_new_tokens} behind {longest} tokens of prompt {lengths.index(max(lengths))}"
        raise checks.invalid(_OP, "max_new_tokens", contract, found, f"at most {max(0, limit - longest)} fit")


def settings(
    config: GPTJConfig, *, temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None,
    nucleus_first: bool = False, eos_token_id: int | Sequence[int] | None = None,
    stop_strings: str | Sequence[str] = (), repetition_stop: int | None = None, tokenizer: Any = None,
) -> tuple[Sampler, Stopping]:  # fmt: skip
    """How tokens are chosen and what ends a text, checked; arguments as of `GPTJ.generate`."""
    eos = config.eos_token_ids if eos_token_id is None else eos_token_id
    eos = (eos,) if isinstance(eos, int) else tuple(eos)
    strings = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings)
    sampler = Sampler(temperature, top_k, top_p, nucleus_first)
    stopping = Stopping(eos, strings, repetition_stop, tokenizer)
    sampler.check()
    stopping.check()
    return sampler, stopping
