"""The same bits on every run, thread count and batch; right in forked children and concurrent Python threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import cases
import pytest
import torch

from limber_fast import int8_linear, quantize_int8

SHAPES = ((1, 130, 4500), (16, 1030, 640), (150, 640, 1230), (540, 70, 2100))


def _run(engine, shape, compute="w8a16", dtype=torch.float32, shift=0.0):
    values = cases.int8_layer(*shape, dtype)
    x = (values["x"] + shift).requires_grad_()
    y = int8_linear(x, quantize_int8(values["weight"]), values["bias"], activation="gelu_new", compute=compute,
                    residual=values["residual"], backend=engine)  # fmt: skip
    return y.detach(), *torch.autograd.grad(y, x, values["grad"])


def _equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("compute", ["w8a16", "w8a8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_thread_counts_and_runs(own_kernels, poisoned, threads, shape, compute):
    results = []
    for count in (1, 2, 3, 2, 48):  # with 48, more threads than strips of rows
        threads(count)
        results.append(_run(own_kernels, shape, compute))
    assert all(_equal(results[0], found) for found in results[1:])


@pytest.mark.parametrize("compute", ["w8a16", "w8a8"])
def test_a_row_does_not_depend_on_its_batch(own_kernels, compute):
    """Bit-equal in any batch, whatever kernel its size brings, also beside rows with outliers in other columns."""
    values = cases.int8_layer(80, 96, 1300, torch.float32)
    x = values["x"].clone()
    x[40:60, 700:800] *= 50
    weight = quantize_int8(values["weight"])
    whole = int8_linear(x, weight, values["bias"], activation="gelu_new", compute=compute, backend=own_kernels)
    for rows in (slice(0, 1), slice(3, 7), slice(0, 40), slice(39, 80), slice(50, 66)):
        part = int8_linear(x[rows], weight, values["bias"], activation="gelu_new", compute=compute, backend=own_kernels)
        assert torch.equal(part, whole[rows])


def test_forked_child(own_kernels, threads, same_in_a_forked_child):
    threads(2)
    values = cases.int8_layer(40, 640, 600, torch.float32)
    weight, x = quantize_int8(values["weight"]), values["x"].clone().requires_grad_()

    def run():
        y = int8_linear(x, weight, activation="gelu_new", backend=own_kernels)
        # Compared as bytes: torch's own threaded ops are what a forked child must not call.
        return [t.detach().numpy().tobytes() for t in (y, *torch.autograd.grad(y, x, values["grad"]))]

    same_in_a_forked_child(run)


def test_concurrent_calls(own_kernels, threads):
    threads(2)
    jobs = [(SHAPES[i % 3], "w8a8" if i % 2 else "w8a16", torch.bfloat16, 0.1 * i) for i in range(9)]
    expected = [_run(own_kernels, *job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda job: _run(own_kernels, *job), jobs))
    assert all(_equal(a, b) for a, b in zip(expected, found, strict=True))
