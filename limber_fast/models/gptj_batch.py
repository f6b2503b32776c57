"""Continuous batching: requests join and leave between steps, prompts are computed in chunks, what they share once."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from itertools import takewhile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from limber_fast import checks
from limber_fast.cache import CacheFull, PagePool, PrefixTree, contents
from limber_fast.cache import Sequence as CachedSequence
from limber_fast.models import gptj_generate
from limber_fast.models.gptj_attention import KVCache
from limber_fast.models.gptj_generate import Row, Sampler, Stopping

_OP = "ContinuousBatch"
# Prompt tokens of a step. The four products of a block take 90 us a token at 256 to 512 of them, 98 at 2048 (w8a8, two
# cores), and the fewer they are the sooner the others answer.
CHUNK = 512
# Steps of prompts behind which those who answer get one. 32 captions, 147 + 15 tokens, six layers: 4.7 s with prompts
# first, 5.2 to 5.8 s with both in one step, where attention has the two kinds of work to divide.
PATIENCE = 4
CANCELLED = "cancelled"
OnToken = Callable[[int, str], None]


class Request:
    """One prompt and what is said behind it; made by `ContinuousBatch.submit`.

    Attributes:
        row: `tokens`, `text` and what `stopped` it: of `Generation`, or 'cancelled'.
        error: what its `on_token` raised, or CacheFull where others hold the memory that it needs; either cancels it.
    """

    def __init__(
        self, batch: ContinuousBatch, rows: Tensor, max_new_tokens: int, sampler: Sampler, stopping: Stopping,
        seed: int, on_token: OnToken | None, start: CachedSequence | None,
    ) -> None:  # fmt: skip
        self.batch, self.rows, self.max_new_tokens, self.sampler = batch, rows, max_new_tokens, sampler
        self.on_token, self.start, self.row, self.error = on_token, start, Row(stopping), None
        self.generator = torch.Generator(rows.device).manual_seed(seed % 2**63)
        self.sequence: CachedSequence | None = None
        self.fed = 0  # rows whose keys and values are there
        self.contents: list[Hashable] = [] if batch.tree is None or start is not None else contents(rows)
        self.pieces: deque[str] = deque()

    @property
    def done(self) -> bool:
        return bool(self.row.stopped)

    @property
    def in_prefill(self) -> bool:
        return self.fed < len(self.rows)

    @property
    def pages(self) -> int:
        """Of all its tokens."""
        before = 0 if self.start is None else self.start.length
        return -(-(before + len(self.rows) + self.max_new_tokens) // self.batch.pool.page_size)

    @property
    def pages_to_come(self) -> int:
        """More than it holds; a page that it shares is copied when it writes there."""
        return self.pages - len(self.sequence.pages) + self.sequence._last_page_is_shared()

    def cancel(self) -> None:
        """Ends it; its pages are free at once, or behind the step that is running."""
        with self.batch.lock:
            if not self.done:
                self.row.stopped = CANCELLED
                self.batch._drop(self)

    def wait(self) -> Request:
        """Steps the batch, for everybody's requests, until this one is done.

        Raises: `error`.
        """
        while not self.done:
            self.batch.step()
        return self._checked()

    def _checked(self) -> Request:
        if self.error is not None:
            raise self.error
        return self

    def stream(self) -> Iterator[str]:
        """Pieces of the text as they become certain; whoever leaves the loop early cancels."""
        try:
            while self.pieces or not self.done:
                if self.pieces:
                    yield self.pieces.popleft()
                else:
                    self.batch.step()
            self._checked()
        finally:
            self.cancel()


class ContinuousBatch:
    """Answers many prompts that come and go; greedy answers are those of each prompt alone, whatever else runs.

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
        tokenizer: Any = None, on_token: OnToken | None = None, **choosing: Any,
    ) -> Request:  # fmt: skip
        """One prompt: a text, ids, or [S, E]. Arguments as of `GPTJ.generate`; on_token: called as (token, text)."""
        sampler, stopping = gptj_generate.settings(self.model.config, tokenizer=tokenizer, **choosing)
        if isinstance(input_ids, Tensor):
            input_ids = [input_ids.flatten()]
        embeds = None if inputs_embeds is None else [inputs_embeds]
        with torch.no_grad():
            rows, lengths = gptj_generate.packed_prompts(self.model, input_ids, embeds, None, tokenizer)
        if len(lengths) > 1:
            raise checks.invalid(_OP, "input_ids", "be one prompt", f"{len(lengths)}", "submit one after another")
        gptj_generate.check_room(lengths, max_new_tokens, self.model.config.n_positions)
        return self.add(rows, max_new_tokens, sampler, stopping, seed, on_token)

    def add(
        self, rows: Tensor, max_new_tokens: int, sampler: Sampler, stopping: Stopping, seed: int,
        on_token: OnToken | None = None, start: CachedSequence | None = None,
    ) -> Request:  # fmt: skip
        """`submit` of checked arguments; start: a sequence of the pool that comes before rows [S, E]."""
        request = Request(self, rows, max_new_tokens, sampler, stopping, seed, on_token, start)
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

    def _next(self) -> list[tuple[Request, int]]:
        """Who takes part in the next step, with how many tokens."""
        answering = [(request, 1) for request in self._running if not request.in_prefill]
        if answering and self._prefills >= PATIENCE:
            self._prefills = 0
            return answering
        work, left = [], self.chunk
        for request in self._running:
            if request.in_prefill and left:
                work.append((request, min(left, len(request.rows) - request.fed)))
                left -= work[-1][1]
        self._prefills = self._prefills + 1 if work else 0
        return work or answering

    def _forward(self, work: list[tuple[Request, int]]) -> None:
        counts = [count for _, count in work]
        rows = [
            r.rows[r.fed : r.fed + count] if r.in_prefill else self._embedded(r.row.tokens[-1:]) for r, count in work
        ]  # fmt: skip
        cache = KVCache(self.pool, [request.sequence for request, _ in work])
        hidden = self.model.hidden_states(torch.cat(rows), counts, cache=cache)
        ready, end = [], 0
        for request, count in work:
            end += count
            if request.in_prefill:
                request.fed += count
                if request.contents:  # whole pages: none that is still written is shared
                    whole = request.fed // self.pool.page_size * self.pool.page_size
                    self.tree.insert(request.sequence, request.contents[:whole])
            if not request.in_prefill:
                ready.append((end - 1, request))
        for sampler in dict.fromkeys(request.sampler for _, request in ready):
            chosen = [(at, request) for at, request in ready if request.sampler == sampler]
            logits = self.model.lm_head(hidden[[at for at, _ in chosen]]).float()
            tokens = sampler(logits, [request.generator for _, request in chosen])
            for (_, request), token in zip(chosen, tokens, strict=True):
                self._say(request, token)

    def _embedded(self, tokens: list[int]) -> Tensor:
        return F.embedding(torch.tensor(tokens, device=self.model.device), self.model.wte)

    @staticmethod
    def _say(request: Request, token: int) -> None:
        row = request.row
        if request.done:  # cancelled in this step
            return
        piece = row.add(token, last=len(row.tokens) + 1 == request.max_new_tokens)
        if piece:
            request.pieces.append(piece)
        if request.on_token is not None:
            try:
                request.on_token(token, piece)
            except BaseException as error:  # for the one who waits for it, who may not be the one that steps
                request.error, row.stopped = error, row.stopped or CANCELLED

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
