"""The same bits on every run and thread count; right in forked children and concurrent Python threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import cases
import pytest
import torch

from limber_fast import info_nce

SHAPES = ((640, 640, 123), (1023, 1023, 64), (123, 123, 640))


def _run(engine, shape, dtype=torch.float32, shift=0.0, **options):
    image, text, scale = cases.towers("unit", *shape, dtype)
    leaves = [x.requires_grad_() for x in (image + shift, text.clone(), torch.tensor(scale))]
    loss = info_nce(*leaves, backend=engine, **options)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def _equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cache_mb", [0, 256])
def test_ten_runs(engine, poisoned, dtype, cache_mb):
    first = _run(engine, SHAPES[0], dtype, cache_mb=cache_mb)
    assert all(_equal(first, _run(engine, SHAPES[0], dtype, cache_mb=cache_mb)) for _ in range(9))


@pytest.mark.parametrize("options", [{}, {"normalize": True, "label_smoothing": 0.1, "cache_mb": 0},
                                     {"variant": "sigmoid"}], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_thread_counts(own_kernels, poisoned, threads, shape, dtype, options):
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(_run(own_kernels, shape, dtype, **options))
    assert _equal(results[0], results[1]) and _equal(results[0], results[2])


def test_statistics_do_not_change_the_loss(engine):
    image, text, scale = cases.towers("unit", *SHAPES[0], torch.float32)
    with_stats, _ = info_nce(image, text, scale, backend=engine, return_stats=True)
    assert info_nce(image, text, scale, backend=engine) == with_stats


def test_forked_child(own_kernels, threads, same_in_a_forked_child):
    threads(2)
    image, text, scale = cases.towers("unit", *SHAPES[0], torch.float32)
    leaves = [image.clone().requires_grad_(), text.clone().requires_grad_()]

    def run():
        loss = info_nce(*leaves, scale, backend=own_kernels)
        # Compared as bytes: torch's own threaded ops are what a forked child must not call.
        return [x.detach().numpy().tobytes() for x in (loss, *torch.autograd.grad(loss, leaves))]

    same_in_a_forked_child(run)


def test_concurrent_calls(engine, threads):
    threads(2)
    jobs = [(SHAPES[i % 3], torch.float32 if i % 2 else torch.bfloat16, 0.01 * i) for i in range(12)]
    expected = [_run(engine, *job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda job: _run(engine, *job), jobs))
    for a, b in zip(expected, found, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=0 if engine == "cpu" else 1e-2, atol=0 if engine == "cpu" else 1e-4)
