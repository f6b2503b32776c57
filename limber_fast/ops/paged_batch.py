"""Where the tokens of a step's sequences lie, and which of them several sequences share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch

from limber_fast import checks

PAGE_SIZE = 8  # tokens; see `limber_fast.prefix_attention`

_OP = "PagedBatch"


class PagedBatch:
    """N sequences of one step: how many tokens each has and brings, and its pages. Made once, used by every layer.

    Tokens 0 .. length-1 of a sequence lie in order in the places of its pages; the newest `queries` of them are the
    rows that this step's calls bring. Sequences whose page tables begin with equal page numbers share those tokens:
    `shared` lists maximal runs of whole pages that at least two sequences hold, level by level (a prefix of all, then a
    longer one of some), in any order of the sequences. A page that one sequence writes in this step must not be shared.

    Args:
        queries: [N] new tokens of each sequence, at least 0.
        lengths: [N] tokens of each sequence, the new ones included.
        page_tables: [N] page numbers of each sequence, at least ceil(length / page_size) of them.
        positions: the rotary position of each new token, T numbers; None: its index in its sequence.
        page_size: tokens of a page.
        device: where the tensors are made.

    Attributes:
        tokens: T, the sum of `queries`.
        queries, lengths, page_table, order, shared, private: int32 tensors. Sequence `n` brings rows queries[n] ..
            queries[n + 1] - 1. A row (first, last, begin, end, depth) of `shared` says that the sequences
            order[first:last] hold tokens begin .. end-1 in the same pages, behind `depth` other runs; a sequence's runs
            follow each other from token 0 to private[n], its first token that it reads alone.
        depth: the most runs that a sequence has.

    Raises: ValueError for numbers that contradict each other.
    """

    # A run is worth its own pass from this many tokens saved on: one token of every further sequence.
    WORTHWHILE = PAGE_SIZE

    def __init__(
        self, queries: Sequence[int], lengths: Sequence[int], page_tables: Sequence[Sequence[int]], *,
        positions: Sequence[int] | None = None, page_size: int = PAGE_SIZE, device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        checks.paged_sequences(_OP, queries, lengths, page_tables, page_size)
        self.tokens, self.page_size, self.longest = sum(queries), page_size, max(lengths, default=0)
        self.highest_page = max((max(table, default=-1) for table in page_tables), default=-1)
        if positions is not None:
            checks.token_positions(_OP, positions, self.tokens)
        self.highest_position = self.longest - 1 if positions is None else max(positions, default=-1)

        whole = [(length - new) // page_size for length, new in zip(lengths, queries, strict=True)]
        heads = [tuple(table[:n]) for table, n in zip(page_tables, whole, strict=True)]
        order = sorted(range(len(heads)), key=heads.__getitem__)
        runs = list(_runs([heads[n] for n in order], 0, len(order), 0, self.WORTHWHILE // page_size or 1))
        private, depths = [0] * len(heads), [0] * len(heads)
        shared = []
        for first, last, begin, end in runs:
            shared.append([first, last, begin * page_size, end * page_size, depths[order[first]]])
            for n in order[first:last]:
                private[n], depths[n] = max(private[n], end * page_size), depths[n] + 1
        self.depth = max(depths, default=0)

        width = max(map(len, page_tables), default=0)
        rows = [0]
        for new in queries:
            rows.append(rows[-1] + new)

        def tensor(values: list, *shape: int) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32).reshape(shape).to(device)

        self.queries, self.lengths = tensor(rows, -1), tensor(list(lengths), -1)
        self.page_table = tensor([[*table, *[0] * (width - len(table))] for table in page_tables], len(heads), width)
        self.order, self.private = tensor(order, -1), tensor(private, -1)
        self.shared = tensor(shared, -1, 5)
        self.positions = None if positions is None else tensor(list(positions), -1)

    def __len__(self) -> int:
        return len(self.lengths)


def _runs(
    tables: list[tuple[int, ...]], first: int, last: int, begin: int, fewest: int
) -> Iterator[tuple[int, int, int, int]]:
    """Runs of shared pages (first, last, begin, end) of sorted tables that agree up to page `begin`."""
    if last - first < 2:
        return
    low, high = tables[first], tables[last - 1]  # sorted: what these two share, all between them share
    end = begin
    while end < min(len(low), len(high)) and low[end] == high[end]:
        end += 1
    covered = begin
    if (end - begin) * (last - first - 1) >= fewest and end > begin:
        yield first, last, begin, end
        covered = end
    at = first
    for _, group in groupby(range(first, last), key=lambda n: tables[n][end : end + 1]):
        size = sum(1 for _ in group)
        if size < last - first and len(tables[at]) > end:
            yield from _runs(tables, at, at + size, covered, fewest)
        at += size
