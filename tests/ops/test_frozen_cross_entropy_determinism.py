"""The same bits on every run, thread count and batch; right in forked children and concurrent Python threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import cases
import pytest
import torch

from limber_fast import frozen_cross_entropy, quantize_int8

SHAPES = ((1, 9000, 130), (40, 4500, 70), (300, 5000, 96))


def _run(engine, shape, dtype=torch.float32, rows=slice(None)):
    values = cases.head(*shape, dtype)
    hidden = values["hidden"][rows].clone().requires_grad_()
    losses = frozen_cross_entropy(hidden, quantize_int8(values["weight"]), values["bias"], values["labels"][rows],
                                  reduction="none", backend=engine)  # fmt: skip
    return losses.detach(), torch.autograd.grad(losses, hidden, values["grad"][rows].float())[0]


def _equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_thread_counts_and_runs(own_kernels, poisoned, threads, shape):
    results = []
    for count in (1, 2, 3, 2):
        threads(count)
        results.append(_run(own_kernels, shape))
    assert all(_equal(results[0], found) for found in results[1:])


def test_a_row_does_not_depend_on_its_batch(own_kernels):
    whole = _run(own_kernels, SHAPES[1])
    for rows in (slice(0, 1), slice(3, 7), slice(0, 20), slice(19, 40)):
        assert _equal(_run(own_kernels, SHAPES[1], rows=rows), (x[rows] for x in whole))


def test_forked_child(own_kernels, threads, same_in_a_forked_child):
    threads(2)
    values = cases.head(40, 4500, 70, torch.float32)
    weight, hidden = quantize_int8(values["weight"]), values["hidden"].clone().requires_grad_()
    ones = torch.ones(40)

    def run():
        losses = frozen_cross_entropy(hidden, weight, None, values["labels"], reduction="none", backend=own_kernels)
        # Compared as bytes: torch's own threaded ops are what a forked child must not call.
        return [t.detach().numpy().tobytes() for t in (losses, *torch.autograd.grad(losses, hidden, ones))]

    same_in_a_forked_child(run)


def test_concurrent_calls(own_kernels, threads):
    threads(2)
    jobs = [(SHAPES[i % 3], (torch.float32, torch.bfloat16)[i % 2]) for i in range(6)]
    expected = [_run(own_kernels, *job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda job: _run(own_kernels, *job), jobs))
    assert all(_equal(a, b) for a, b in zip(expected, found, strict=True))
