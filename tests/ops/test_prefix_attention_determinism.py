"""The same bits on every run and thread count; right in forked children and concurrent Python threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import cases
import pytest
import torch

from limber_fast import PagedBatch, prefix_attention, rotary_table

TABLES = [[*range(70), 70 + i, 80 + i, 90 + i] for i in range(9)] + [[*range(100, 140)], [150]]
BATCH = PagedBatch([1] * 9 + [200, 3], [570 + i for i in range(9)] + [301, 3], TABLES)
ROTARY = rotary_table(600, 32)


def _pages(dtype):
    return torch.randn(160, 3, 2, 8, 64, generator=torch.Generator().manual_seed(21)).to(dtype)


def _run(engine, dtype=torch.bfloat16, shift=0.0):
    pages = _pages(dtype)
    q, k, v = cases.attention_rows(BATCH.tokens, 3, 64, dtype)
    return prefix_attention(q + shift, k, v, pages, BATCH, rotary=ROTARY, backend=engine), pages


def _equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_thread_counts_and_runs(own_kernels, poisoned, threads, dtype):
    results = []
    for count in (1, 2, 3, 2):
        threads(count)
        results.append(_run(own_kernels, dtype))
    assert all(_equal(results[0], found) for found in results[1:])


def test_forked_child(own_kernels, threads, same_in_a_forked_child):
    threads(2)

    pages, rows = _pages(torch.float32), cases.attention_rows(BATCH.tokens, 3, 64, torch.float32)

    def run():  # compared as bytes: torch's own threaded ops are what a forked child must not call
        out = prefix_attention(*rows, pages, BATCH, rotary=ROTARY, backend=own_kernels)
        return out.numpy().tobytes(), pages.numpy().tobytes()

    same_in_a_forked_child(run)


def test_concurrent_calls(own_kernels, threads):
    threads(2)
    jobs = [(torch.bfloat16 if i % 2 else torch.float32, 0.1 * i) for i in range(8)]
    expected = [_run(own_kernels, *job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda job: _run(own_kernels, *job), jobs))
    assert all(_equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_a_sequence_hardly_depends_on_its_batch(own_kernels, dtype):
    """Alone, with two of its group, with all of it: other parts, the same result but for the rounding of merges."""
    whole, _ = _run(own_kernels, dtype)
    pages, rows = _pages(dtype), cases.attention_rows(BATCH.tokens, 3, 64, dtype)
    for members in ([4], [4, 7], [2, 4, 9]):
        lengths, new = BATCH.lengths.tolist(), BATCH.queries.diff().tolist()
        batch = PagedBatch([new[n] for n in members], [lengths[n] for n in members], [TABLES[n] for n in members])
        some = torch.cat([torch.arange(BATCH.queries[n], BATCH.queries[n + 1]) for n in members])
        found = prefix_attention(*(x[some] for x in rows), pages.clone(), batch, rotary=ROTARY, backend=own_kernels)
        assert max(cases.errors(found, whole[some])) <= cases.FLOOR[dtype]
