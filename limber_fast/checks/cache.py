"""What the cache of keys and values asks of its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from limber_fast.checks.general import invalid, shape_of


def cache_budget(op: str, budget_bytes: int, page_bytes: int) -> None:
    if budget_bytes < page_bytes:
        raise invalid(op, "budget_bytes", f"hold at least one page of {page_bytes} bytes", repr(budget_bytes))


def open_sequences(op: str, sequences: Sequence[Any], queries: Sequence[int], pool: Any) -> None:
    if len(sequences) != len(queries):
        found = f"{len(sequences)} sequences and {len(queries)} queries"
        raise invalid(op, "queries", "have one number per sequence", found)
    if len({id(sequence) for sequence in sequences}) < len(sequences):
        raise invalid(op, "sequences", "be different ones", "one of them twice", "fork it")
    for sequence, new in zip(sequences, queries, strict=True):
        if sequence.released:
            raise invalid(op, "sequence", "hold its pages", "a released one", "make a new one, or fork before release")
        if sequence.pool is not pool:
            raise invalid(op, "sequence", "be of this pool", "a sequence of another")
        if new < 0:
            raise invalid(op, "queries", "not be negative", str(new))


def kept_tokens(op: str, length: int, have: int) -> None:
    if not 0 <= length <= have:
        raise invalid(op, "length", f"lie between 0 and the {have} tokens there are", repr(length))


def embedding_rows(op: str, part: Tensor) -> None:
    if part.ndim != 2:
        raise invalid(op, "a part", "be token ids or embeddings [S, E]", shape_of(part))


def known_tokens(op: str, count: int, have: int) -> None:
    if count > have:
        raise invalid(op, "tokens", f"be at most the {have} that the sequence holds", str(count), "write them first")
