"""torch.library registration, torch.compile, dispatch, and what a batch finds to share."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limber_fast import PagedBatch, prefix_attention, rotary_table

FORWARD = torch.ops.limber_fast.prefix_attention_fwd.default
BATCH = PagedBatch([1, 2, 5], [17, 20, 5], [[0, 1, 2], [0, 1, 3], [4]])
ROTARY = rotary_table(32, 16)


def _rows(seed=0):
    return torch.randn(3, BATCH.tokens, 2, 64, generator=torch.Generator().manual_seed(seed)).unbind(0)


@pytest.mark.parametrize("rotary", [None, ROTARY])
def test_opcheck(engine, rotary):
    b = BATCH
    torch.library.opcheck(FORWARD, (
        *_rows(), torch.randn(6, 2, 2, 8, 64), None, b.queries, b.lengths, b.page_table, b.order, b.shared, b.private,
        b.depth, None, rotary, 0.125, engine,
    ))  # fmt: skip


@pytest.mark.parametrize("engine, compiler", [("eager", "aot_eager"), ("cpu", "inductor")])
def test_compile_whole_graph(engine, compiler):
    """The pages are written in place in the compiled graph too."""

    def step(q, k, v, pages):
        return prefix_attention(q * 1.5, k, v, pages, BATCH, rotary=ROTARY, backend=engine) + pages[2].sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    for seed in range(2):
        results = []
        for function in (compiled, step):
            pages = torch.ones(6, 2, 2, 8, 64)
            results.append((function(*_rows(seed), pages), pages))
        for found, true in zip(*results, strict=True):
            torch.testing.assert_close(found, true)


def test_sharing_in_any_order():
    """A prefix of four sequences, a longer one of two of them, and one that has nothing in common."""
    tables = [[5, 6, 7, 20], [5, 6, 8, 9, 21], [1, 2], [5, 6, 22], [5, 6, 8, 9, 23]]
    lengths = [30, 33, 16, 17, 40]
    for order in itertools.permutations(range(5)):
        batch = PagedBatch([1] * 5, [lengths[i] for i in order], [tables[i] for i in order])
        runs = {
            (frozenset(order[n] for n in batch.order[a:b]), *run) for a, b, *run in batch.shared.tolist()
        }
        assert runs == {(frozenset({0, 1, 3, 4}), 0, 16, 0), (frozenset({1, 4}), 16, 32, 1)}
        assert batch.depth == 2
        assert {order[n]: int(batch.private[n]) for n in range(5)} == {0: 16, 1: 32, 2: 0, 3: 16, 4: 32}


def test_new_tokens_are_never_shared():
    batch = PagedBatch([9, 9], [24, 24], [[0, 1, 2], [0, 1, 3]])
    assert batch.shared.tolist() == [[0, 2, 0, 8, 0]] and batch.private.tolist() == [8, 8] and batch.depth == 1


@settings(deadline=None)
@given(st.lists(st.tuples(st.lists(st.integers(0, 2), max_size=5), st.integers(0, 20)), max_size=9))
def test_shared_runs_lead_every_sequence_to_its_private_part(sequences):
    """Page numbers as a path: equal pages have equal histories, as forks have."""
    tables = [[hash(tuple(path[: i + 1])) % (1 << 30) for i in range(len(path))] for path, _ in sequences]
    lengths = [8 * len(path) for path, _ in sequences]
    queries = [min(new, length) for (_, new), length in zip(sequences, lengths, strict=True)]
    batch = PagedBatch(queries, lengths, tables)
    assert sorted(batch.order.tolist()) == list(range(len(sequences)))
    at, depths = [0] * len(sequences), [0] * len(sequences)
    for first, last, begin, end, depth in batch.shared.tolist():
        members = batch.order[first:last].tolist()
        assert len(members) >= 2 and begin < end
        for n in members:
            assert at[n] == begin and depths[n] == depth
            assert tables[n][begin // 8 : end // 8] == tables[members[0]][begin // 8 : end // 8]
            at[n], depths[n] = end, depths[n] + 1
    assert at == batch.private.tolist() and batch.depth == max(depths, default=0)
    assert all(end <= length - new for end, length, new in zip(at, lengths, queries, strict=True))
