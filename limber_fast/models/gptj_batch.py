"""Continuous batching: requests join and leave between steps, prompts are computed in chunks, what they share once."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import islice, takewhile
from typing import Any

import torch
from torch import Tensor

from limber_fast import checks
from limber_fast.cache import CacheFull, PagePool, PrefixTree, contents
from limber_fast.cache import Sequence as CachedSequence
from limber_fast.models import gptj_generate
from limber_fast.models.gptj_attention import KVCache
from limber_fast.models.gptj_generate import Sampler, Stopping
from limber_fast.models.gptj_request import CANCELLED, Lookup, OnToken, Request

_OP = "ContinuousBatch"
# Prompt tokens of a step. The four products of a block take 90 us a token at 256 to 512 of them, 98 at 2048 (w8a8, two
# cores), and the fewer they are the sooner the others answer.
CHUNK = 512
# Steps of prompts behind which those who answer get one. 32 captions, 147 + 15 tokens, six layers: 4.7 s with prompts
# first, 5.2 to 5.8 s with both in one step, where attention has the two kinds of work to divide.
PATIENCE = 4


class ContinuousBatch:
    """Answers many prompts that come and go; greedy answers are those of each prompt alone, whatever else runs, but for
    ties that are nearer than the rounding of products of another size.

    A step computes up to `chunk` tokens of prompts, or one token of every request that is answering. A request is
    admitted, in order, when the pool has all pages that it may need, so that none runs out half way. One whose prompt
    begins as another's that is being computed waits for that part and goes on from its pages.

    Safe under threads: whoever steps, steps for all.

    Args:
        model: GPTJ. pool: for its pages, `GPTJ.continuous_batch` makes one.
        tree: where beginnings of prompts are looked up and kept; None for none.
        max_batch: requests at a time. chunk: prompt tokens of a step.
    """

    def __init__(
        self, model: Any, pool: PagePool, tree: PrefixTree | None = None, *, max_batch: int = 256, chunk: int = CHUNK
    ) -> None:
        checks.size(_OP, "max_batch", max_batch)
        checks.size(_OP, "chunk", chunk)
        self.model, self.pool, self.tree, self.max_batch, self.chunk = model, pool, tree, max_batch, chunk
        self.lock = threading.RLock()
        self._waiting: list[Request] = []
        self._running: list[Request] = []
        self._stepping, self._prefills = False, 0

    def submit(
        self, input_ids: Any = None, *, inputs_embeds: Tensor | None = None, max_new_tokens: int = 100, seed: int = 0,
        tokenizer: Any = None, on_token: OnToken | None = None, lookup: int = 0, **choosing: Any,
    ) -> Request:  # fmt: skip
        """One prompt: a text, ids, or [S, E]. Arguments as of `GPTJ.generate`; on_token: called as (token, text)."""
        sampler, stopping = gptj_generate.settings(self.model.config, tokenizer=tokenizer, **choosing)
        if isinstance(input_ids, Tensor):
            input_ids = [input_ids.flatten()]
        embeds = None if inputs_embeds is None else [inputs_embeds]
        with torch.no_grad():
            rows, lengths, ids = gptj_generate.packed_prompts(self.model, input_ids, embeds, None, tokenizer)
        if len(lengths) > 1:
            raise checks.invalid(_OP, "input_ids", "be one prompt", f"{len(lengths)}", "submit one after another")
        gptj_generate.check_room(lengths, max_new_tokens, self.model.config.n_positions)
        return self.add(rows, max_new_tokens, sampler, stopping, seed, on_token, lookup=lookup, ids=ids[0])

    def add(
        self, rows: Tensor, max_new_tokens: int, sampler: Sampler, stopping: Stopping, seed: int,
        on_token: OnToken | None = None, start: CachedSequence | None = None, lookup: int = 0, ids: Sequence[int] = (),
    ) -> Request:  # fmt: skip
        """`submit` of checked arguments; start: a sequence of the pool that comes before rows [S, E]."""
        checks.not_negative(_OP, "lookup", lookup)
        drafts = Lookup(ids, lookup) if lookup and sampler.temperature == 0 else None
        request = Request(self, rows, max_new_tokens, sampler, stopping, seed, on_token, start, drafts)
        if request.pages > self.pool.n_pages:
            tokens = self.pool.n_pages * self.pool.page_size
            raise checks.invalid(_OP, "prompt and max_new_tokens", f"fit into the cache, {tokens} tokens",
                                 f"{len(rows)} and {max_new_tokens}", "give it more memory")  # fmt: skip
        with self.lock:
            self._waiting.append(request)
        return request

    def stats(self) -> dict[str, int]:
        """Requests waiting, in prefill and answering; and the tree's or the pool's figures."""
        with self.lock:
            prefill = sum(request.in_prefill for request in self._running)
            counts = {"waiting": len(self._waiting), "prefill": prefill, "answering": len(self._running) - prefill}
            return counts | (self.pool if self.tree is None else self.tree).stats()

    @torch.inference_mode()
    def step(self) -> bool:
        """One forward pass; False where there is nothing to do."""
        with self.lock:
            self._admit()
            if not (work := self._next()):
                return False
            self._stepping = True
            try:
                self._forward(work)
            finally:
                self._stepping = False
                for request in [request for request in self._running if request.done]:
                    self._drop(request)
            return True

    def _next(self) -> list[tuple[Request, Tensor]]:
        """Who takes part in the next step, with which rows."""
        prompts = [request for request in self._running if request.in_prefill]
        if not prompts or (self._prefills >= PATIENCE and len(prompts) < len(self._running)):
            self._prefills = 0
            answering = [request for request in self._running if not request.in_prefill]
            return [(request, self._embedded(request.next_tokens())) for request in answering]
        work, left = [], self.chunk
        for request in prompts:
            if left:
                work.append((request, request.rows[request.fed : request.fed + left]))
                left -= len(work[-1][1])
        self._prefills += 1
        return work

    def _forward(self, work: list[tuple[Request, Tensor]]) -> None:
        counts = [len(rows) for _, rows in work]
        cache = KVCache(self.pool, [request.sequence for request, _ in work])
        asked, end = [], 0  # who says something, behind which of the tokens
        for request, rows in work:
            end += len(rows)
            if request.fed + len(rows) >= len(request.rows):
                asked += [(request, at) for at in range(end - 1 - len(request.draft), end)]
        x = torch.cat([rows for _, rows in work])
        behind = torch.tensor([at for _, at in asked], dtype=torch.int64, device=x.device)
        hidden = self.model.hidden_states(x, counts, cache=cache, rows=None if len(asked) == len(x) else behind)
        for request, rows in work:
            if request.in_prefill:
                request.fed += len(rows)
                if request.contents:  # whole pages: none that is still written is shared
                    whole = request.fed // self.pool.page_size * self.pool.page_size
                    self.tree.insert(request.sequence, request.contents[:whole])
        for sampler in dict.fromkeys(request.sampler for request, _ in asked):
            chosen = [i for i, (request, _) in enumerate(asked) if request.sampler == sampler]
            logits = self.model.lm_head(hidden if len(chosen) == len(asked) else hidden[chosen]).float()
            tokens = iter(sampler(logits, [asked[i][0].generator for i in chosen]))
            for request in dict.fromkeys(asked[i][0] for i in chosen):  # a token and its draft each
                request.take(list(islice(tokens, 1 + len(request.draft))))

    def _embedded(self, tokens: list[int]) -> Tensor:
        return self.model.rows_of(torch.tensor(tokens, device=self.model.device))

    def _drop(self, request: Request) -> None:
        """Takes out a request that is done; what was computed stays in the tree."""
        if self._stepping:
            return
        (self._waiting if request.sequence is None else self._running).remove(request)
        if request.sequence is not None:
            if request.contents and not request.in_prefill:
                said = request.row.tokens[: request.sequence.length - len(request.rows)]
                known = contents(self._embedded(said)) if said else []
                self.tree.insert(request.sequence, [*request.contents, *known])
            request.sequence.release()

    def spare_pages(self) -> int:
        """Free ones, and those of the tree alone, that no running request may still need."""
        promised = sum(request.pages_to_come for request in self._running)
        return self.pool.free_pages() + (0 if self.tree is None else self.tree.spare_pages()) - promised

    def _admit(self) -> None:
        for request in list(self._waiting):
            if len(self._running) == self.max_batch:
                break
            if self._waits_for_another(request):
                continue
            if request.start is not None:
                sequence = request.start.fork()
            else:
                sequence = self.tree.find(request.contents) if request.contents else self.pool.sequence()
            request.sequence = sequence
            if (missing := request.pages_to_come - self.spare_pages()) > 0:
                sequence.release()
                request.sequence = None
                if self._running:
                    break
                held = f"{_OP}: {missing} pages are missing, which others hold; release prefixes"
                request.error, request.row.stopped = CacheFull(held), CANCELLED
                self._waiting.remove(request)
                continue
            if request.start is None:
                request.fed = sequence.length
            self._waiting.remove(request)
            self._running.append(request)

    def _waits_for_another(self, request: Request) -> bool:
        """Whether another one's prefill will soon have more of this prompt than it has now."""
        size = self.pool.page_size
        for other in self._running if request.contents else ():
            if other.in_prefill and other.contents:
                pairs = zip(request.contents[:-1], other.contents, strict=False)
                common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
                if other.fed // size < common // size:
                    return True
        return False
