"""Pages of keys and values, counted by reference, and the sequences that hold them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Numbers
from typing import Any

import torch
from torch import Tensor

from limber_fast import checks, dispatch, native
from limber_fast.backends import cuda
from limber_fast.ops.paged_batch import PAGE_SIZE, PagedBatch

_POOL, _SEQUENCE = "PagePool", "Sequence"


def page_size_of(dtype: torch.dtype) -> int:
    """Tokens of a page unless told: of int8 twice as many, so that a head's run of K and V is as long.

    Read in runs of 4 KiB, int8 pages come at two thirds to four fifths of the rate of 8 KiB (Zen 5, heads of 256).
    """
    return 2 * PAGE_SIZE if dtype == torch.int8 else PAGE_SIZE


class CacheFull(RuntimeError):
    """More pages are in use at once than the pool has; the message says how many are missing."""


class PagePool:
    """All pages of a model's layers, and who holds them.

    A page holds `page_size` tokens in every layer and is held by any number of sequences. Only its sole holder writes
    it: a fork shares all pages, and the first token written into a shared page moves the writer to a copy. On a GPU
    one launch of the CUDA extension, where it is built, makes all copies of a batch in all layers.

    Safe under threads: the pool's counts change under one lock. A sequence belongs to one thread at a time.

    Args:
        layers, heads, head_dim: of the model.
        dtype: of keys and values; int8 keeps each with a scale of its own in fp32, half the memory of 16 bits.
        budget_bytes: of all pages together; memory of pages that were never used is not touched.
        page_size: tokens of a page; by default 8, of int8 16: see `limber_fast.prefix_attention`.
        device: where the pages lie.

    Attributes:
        storage: [layers, n_pages, heads, 2, page_size, head_dim].
        scales: [layers, n_pages, heads, 2, page_size] fp32 of int8 pages, else None.

    Raises: ValueError where the budget holds no page.
    """

    def __init__(
        self, layers: int, heads: int, head_dim: int, *, dtype: torch.dtype, budget_bytes: int,
        page_size: int | None = None, device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        page_size = page_size_of(dtype) if page_size is None else page_size
        self.page_bytes = self.bytes_of_page(layers, heads, head_dim, dtype, page_size)
        self.n_pages = budget_bytes // self.page_bytes
        checks.cache_budget(_POOL, budget_bytes, self.page_bytes)
        self.page_size = page_size
        self.storage = torch.empty(layers, self.n_pages, heads, 2, page_size, head_dim, dtype=dtype, device=device)
        self.scales = None
        if dtype == torch.int8:
            self.scales = torch.empty(self.storage.shape[:5], dtype=torch.float32, device=device)
        if self.storage.device.type == "cpu" and native.available_isas():
            # Pages lie 4 or 8 KiB a head: on small pages of the system every one is a miss of the TLB.
            for x in (self.storage, self.scales):
                if x is not None:
                    native.cpu().advise_huge_pages(x.data_ptr(), x.nbytes)
        self.lock = threading.RLock()
        self.reclaim: Callable[[int], Any] | None = None  # frees so many pages that nobody uses, if it can
        self._holders = [0] * self.n_pages
        self._free = list(range(self.n_pages - 1, -1, -1))  # the last freed is used first: its memory is there
        self._forks = self._copies = 0
        self._copied_by_launch = cuda.page_copy_supports(self.storage, self.scales) is None

    @staticmethod
    def bytes_of_page(
        layers: int, heads: int, head_dim: int, dtype: torch.dtype, page_size: int | None = None
    ) -> int:
        """Of a page in all layers, scales included."""
        page_size = page_size_of(dtype) if page_size is None else page_size
        scale = torch.float32.itemsize if dtype == torch.int8 else 0
        return layers * heads * 2 * page_size * (head_dim * dtype.itemsize + scale)

    def layer(self, index: int) -> Tensor:
        """[n_pages, heads, 2, page_size, head_dim]: the `pages` of `limber_fast.prefix_attention`."""
        return self.storage[index]

    def layer_scales(self, index: int) -> Tensor | None:
        """[n_pages, heads, 2, page_size]: its `page_scales`."""
        return None if self.scales is None else self.scales[index]

    def sequence(self) -> Sequence:
        """A sequence without tokens."""
        return Sequence(self, [], 0)

    def batch(
        self, sequences: Numbers[Sequence], queries: Numbers[int], *, positions: Numbers[int] | None = None
    ) -> PagedBatch:
        """Makes room for `queries[n]` new tokens of each sequence and says where all tokens lie.

        The tokens count as the sequences' own from here on; where the step that was to write them fails,
        `Sequence.truncate` takes them back.

        Raises: CacheFull, with nothing changed, where the free pages do not suffice.
        """
        with self.lock:
            checks.open_sequences(_POOL, sequences, queries, self)
            copied = [s for s, new in zip(sequences, queries, strict=True) if new and s._last_page_is_shared()]
            wanted = [-(-(s.length + new) // self.page_size) - len(s.pages)
                      for s, new in zip(sequences, queries, strict=True)]  # fmt: skip
            fresh = self._take(len(copied) + sum(wanted))
            self._move_last_pages([(sequence, fresh.pop()) for sequence in copied])
            for sequence, new, pages in zip(sequences, queries, wanted, strict=True):
                sequence.pages += [fresh.pop() for _ in range(pages)]
                sequence.length += new
            return PagedBatch(
                queries, [s.length for s in sequences], [s.pages for s in sequences], positions=positions,
                page_size=self.page_size, device=self.storage.device,
            )  # fmt: skip

    def free_pages(self) -> int:
        return len(self._free)

    def stats(self) -> dict[str, int]:
        """Pages and bytes in use and in all; forks so far, and pages copied because a fork wrote."""
        with self.lock:
            used = self.n_pages - len(self._free)
            return {
                "pages": used, "bytes": used * self.page_bytes, "pages_in_all": self.n_pages,
                "bytes_in_all": self.n_pages * self.page_bytes, "forks": self._forks, "copied_pages": self._copies,
            }  # fmt: skip

    def _take(self, count: int) -> list[int]:
        if count > len(self._free) and self.reclaim is not None:
            self.reclaim(count - len(self._free))
        if count > len(self._free):
            raise CacheFull(
                f"{_POOL}: {count} pages of {self.page_size} tokens are wanted and {len(self._free)} of {self.n_pages} "
                f"are free; release sequences or raise budget_bytes ({self.page_bytes} a page)"
            )
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._holders[page] = 1
        return taken

    def _move_last_pages(self, moves: list[tuple[Sequence, int]]) -> None:
        """Gives each sequence a copy of its last page, in the fresh page beside it."""
        if moves and self._copied_by_launch and dispatch.preferred("auto") in ("auto", "cuda"):
            cuda.page_copy(self.storage, self.scales, [(sequence.pages[-1], fresh) for sequence, fresh in moves])
        else:
            for sequence, fresh in moves:
                used = sequence.length % self.page_size
                for x in (self.storage, self.scales):
                    if x is not None:
                        x[:, fresh, :, :, :used] = x[:, sequence.pages[-1], :, :, :used]
        self._drop([sequence.pages[-1] for sequence, _ in moves])
        self._copies += len(moves)
        for sequence, fresh in moves:
            sequence.pages[-1] = fresh

    def _hold(self, pages: Iterable[int]) -> None:
        holders = self._holders
        for page in pages:
            holders[page] += 1

    def _drop(self, pages: Iterable[int]) -> None:
        holders, free = self._holders, self._free
        for page in pages:
            holders[page] -= 1
            if not holders[page]:
                free.append(page)


class Sequence:
    """The tokens of one sequence: `length` of them, in order in the places of `pages`. Made by a pool or by `fork`.

    A context manager: its pages are released at the end.
    """

    __slots__ = ("length", "pages", "pool", "released")

    def __init__(self, pool: PagePool, pages: list[int], length: int) -> None:
        self.pool, self.pages, self.length, self.released = pool, pages, length, False

    def fork(self, length: int | None = None) -> Sequence:
        """A new sequence of the first `length` tokens (None: all), at any place, also within a page.

        It shares the pages: nothing is copied before one of the two writes into the page where they part.
        """
        with self.pool.lock:
            checks.open_sequences(_SEQUENCE, [self], [0], self.pool)
            length = self.length if length is None else length
            checks.kept_tokens(_SEQUENCE, length, self.length)
            pages = self.pages[: -(-length // self.pool.page_size)]
            self.pool._hold(pages)
            self.pool._forks += 1
            return Sequence(self.pool, pages, length)

    def truncate(self, length: int) -> None:
        """Forgets all tokens but the first `length`."""
        with self.pool.lock:
            checks.open_sequences(_SEQUENCE, [self], [0], self.pool)
            checks.kept_tokens(_SEQUENCE, length, self.length)
            keep = -(-length // self.pool.page_size)
            self.pool._drop(self.pages[keep:])
            del self.pages[keep:]
            self.length = length

    def release(self) -> None:
        """Gives up its pages; a second time does nothing."""
        with self.pool.lock:
            if not self.released:
                self.pool._drop(self.pages)
            self.pages, self.length, self.released = [], 0, True

    def __enter__(self) -> Sequence:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"Sequence(length={self.length}, pages={self.pages}, released={self.released})"

    def _last_page_is_shared(self) -> bool:
        return bool(self.length % self.pool.page_size) and self.pool._holders[self.pages[-1]] > 1
