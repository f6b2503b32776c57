"""One request of a continuous batch: its prompt, what was said so far, and drafts of what may come next."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from limber_fast.cache import Sequence as CachedSequence
from limber_fast.cache import contents
from limber_fast.models.gptj_generate import Row, Sampler, Stopping

CANCELLED = "cancelled"
OnToken = Callable[[int, str], None]


class Lookup:
    """Drafts what followed the last time that the same three tokens came, in the prompt or in what was said.

    The draft is checked by the model in the step that would have said one token, so it changes no token; a wrong one
    costs the products of its rows. After a draft of which nothing held it pauses, twice as long each time.

    Args: ids: of the prompt, as far as it has any. most: tokens of a draft.
    """

    GRAM, FIRST, LONGEST_PAUSE = 3, 4, 64

    def __init__(self, ids: Sequence[int], most: int) -> None:
        self.ids: list[int] = []
        self.seen: dict[tuple[int, ...], int] = {}
        self.most, self.length, self.pause, self.waits = most, min(self.FIRST, most), 0, 0
        for token in ids:
            self.add(token)

    def add(self, token: int) -> None:
        if len(self.ids) >= self.GRAM:
            self.seen[tuple(self.ids[-self.GRAM :])] = len(self.ids)
        self.ids.append(token)

    def draft(self, room: int) -> list[int]:
        if self.waits:
            self.waits -= 1
            return []
        at = self.seen.get(tuple(self.ids[-self.GRAM :]))
        if at is None:
            return []
        period = len(self.ids) - at  # a phrase that has begun again goes on again
        return [self.ids[at + i % period] for i in range(min(self.length, room))]

    def learn(self, held: int, drafted: int) -> None:
        if held:
            self.pause = 0
            self.length = min(self.most, 2 * self.length if held == drafted else max(2, held))
        else:
            self.pause = min(2 * self.pause + 1, self.LONGEST_PAUSE)
            self.waits, self.length = self.pause, min(self.FIRST, self.most)


class Request:
    """One prompt and what is said behind it; made by `ContinuousBatch.submit`.

    Attributes:
        row: `tokens`, `text` and what `stopped` it: of `Generation`, or 'cancelled'.
        error: what its `on_token` raised, or CacheFull where others hold the memory that it needs; either cancels it.
    """

    def __init__(
        self, batch: Any, rows: Tensor, max_new_tokens: int, sampler: Sampler, stopping: Stopping,
        seed: int, on_token: OnToken | None, start: CachedSequence | None, lookup: Lookup | None,
    ) -> None:  # fmt: skip
        self.batch, self.rows, self.max_new_tokens, self.sampler = batch, rows, max_new_tokens, sampler
        self.on_token, self.start, self.row, self.error = on_token, start, Row(stopping), None
        self.generator = torch.Generator(rows.device).manual_seed(seed % 2**63)
        self.sequence: CachedSequence | None = None
        self.fed = 0  # rows whose keys and values are there
        self.contents: list[Hashable] = [] if batch.tree is None or start is not None else contents(rows)
        self.pieces: deque[str] = deque()
        self.lookup, self.draft = lookup, []  # tokens that are tried behind the last one in this step

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

    def next_tokens(self) -> list[int]:
        """The last token, whose keys and values are not there yet, and a draft of those behind it."""
        tokens = self.row.tokens
        self.draft = [] if self.lookup is None else self.lookup.draft(self.max_new_tokens - len(tokens) - 1)
        return [tokens[-1], *self.draft]

    def take(self, tokens: list[int]) -> None:
        """What the model says behind each of the tokens of this step: up to where the draft differs it holds."""
        draft, self.draft = self.draft, []
        self._say(tokens[0])
        held = 0
        while held < len(draft) and draft[held] == tokens[held] and not self.done:
            held += 1
            self._say(tokens[held])
        if draft:
            self.sequence.truncate(self.sequence.length - len(draft) + held)
            self.lookup.learn(held, len(draft))

    def _say(self, token: int) -> None:
        row = self.row
        if self.done:  # cancelled in this step
            return
        piece = row.add(token, last=len(row.tokens) + 1 == self.max_new_tokens)
        if self.lookup is not None:
            self.lookup.add(token)
        if piece:
            self.pieces.append(piece)
        if self.on_token is not None:
            try:
                self.on_token(token, piece)
            except BaseException as error:  # for the one who waits for it, who may not be the one that steps
                self.error, row.stopped = error, row.stopped or CANCELLED

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
