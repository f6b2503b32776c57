"""The same bits on every run and thread count; right in forked children and concurrent Python threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import cases
import pytest
import torch

from limber_fast import project_concat

LEAVES = ("features", "weight", "bias", "ln_weight", "ln_bias")
SHAPES = ((1, 300, 1030), (49, 123, 640), (150, 640, 123))  # k, D, E for the 5 images of the few-shot prompts


def _run(engine, shape, dtype=torch.float32, shift=0.0, magma=True):
    rows = cases.PROMPTS["few-shot"]
    values = cases.projection(5, *shape, dtype)
    leaves = [(values[name] + shift).requires_grad_() for name in LEAVES[: 5 if magma else 3]]
    out = project_concat(
        *leaves[:3], cases.prompts(rows, shape[0]), values["embedding"], image_token_id=cases.IMAGE_TOKEN,
        dropout_p=0.1, seed=4, layer_norm=(*leaves[3:], 1e-5) if magma else None, backend=engine,
    )  # fmt: skip
    return out.detach(), *torch.autograd.grad(out, leaves, out.detach().cos())


def _equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("magma", [False, True])
def test_ten_runs(engine, poisoned, magma, dtype):
    first = _run(engine, SHAPES[1], dtype, magma=magma)
    assert all(_equal(first, _run(engine, SHAPES[1], dtype, magma=magma)) for _ in range(9))


@pytest.mark.parametrize("magma", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_thread_counts(own_kernels, poisoned, threads, shape, dtype, magma):
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(_run(own_kernels, shape, dtype, magma=magma))
    assert _equal(results[0], results[1]) and _equal(results[0], results[2])


def test_forked_child(own_kernels, threads, same_in_a_forked_child):
    threads(2)
    rows = cases.prompts(cases.PROMPTS["few-shot"], 49)
    values = cases.projection(5, *SHAPES[1], torch.float32)
    leaves, grad = [values[name].clone().requires_grad_() for name in LEAVES[:3]], torch.ones(*rows.shape, 640)

    def run():
        out = project_concat(*leaves, rows, values["embedding"], image_token_id=cases.IMAGE_TOKEN, backend=own_kernels)
        # Compared as bytes: torch's own threaded ops are what a forked child must not call.
        return [x.detach().numpy().tobytes() for x in (out, *torch.autograd.grad(out, leaves, grad))]

    same_in_a_forked_child(run)


def test_concurrent_calls(own_kernels, threads):
    threads(2)
    jobs = [(SHAPES[i % 3], torch.float32 if i % 2 else torch.bfloat16, 0.01 * i) for i in range(12)]
    expected = [_run(own_kernels, *job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda job: _run(own_kernels, *job), jobs))
    assert all(_equal(a, b) for a, b in zip(expected, found, strict=True))
