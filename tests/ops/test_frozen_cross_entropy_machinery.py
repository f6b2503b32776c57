"""torch.library registration, torch.compile, autocast and dispatch; the same bits on every run and thread count."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import cases
import pytest
import torch

from limber_fast import dispatch, frozen_cross_entropy, quantize_int8

FORWARD = torch.ops.limber_fast.frozen_cross_entropy_fwd.default
BACKWARD = torch.ops.limber_fast.frozen_cross_entropy_bwd.default
M, V, D = 5, 37, 70
WEIGHT = quantize_int8(torch.randn(V, D, generator=torch.Generator().manual_seed(1)))
LABELS = torch.tensor([0, -100, 36, 5, -100])


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("bias, keep", [(False, False), (True, False), (True, True)])
def test_opcheck_forward(engine, bias, keep, requires_grad):
    hidden = torch.randn(M, D, requires_grad=requires_grad)
    arguments = (hidden, *WEIGHT.buffers(), torch.randn(V) if bias else None, LABELS, -100, keep, engine)
    torch.library.opcheck(FORWARD, arguments)


def test_opcheck_backward(engine):
    torch.library.opcheck(BACKWARD, (torch.randn(M), torch.randn(M, D), LABELS, -100, V, engine))


# What is compiled ends at the op: one instruction set stands for all.
@pytest.mark.parametrize("engine, compiler", [("eager", "aot_eager"), ("cpu", "inductor")])
def test_compile_whole_graph_with_dynamic_shapes(engine, compiler):
    def step(hidden, weight, bias, labels, **options):
        return frozen_cross_entropy(hidden * 1.5, weight, bias, labels, **options).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=compiler)
    for m in (2, 3, 5):
        hidden, bias = torch.randn(m, 2, D, requires_grad=True), torch.randn(V)
        labels = torch.randint(0, V, (m, 2)).index_fill_(0, torch.tensor([1]), -100)
        for reduction in ("mean", "none"):
            results = []
            for function in (compiled, step):
                loss = function(hidden, WEIGHT, bias, labels, reduction=reduction, backend=engine)
                results.append((loss, *torch.autograd.grad(loss, hidden)))
            for found, true in zip(*results, strict=True):
                torch.testing.assert_close(found, true)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_hidden(engine, dtype):
    hidden = torch.randn(M, D, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        loss = frozen_cross_entropy(hidden, WEIGHT, None, LABELS, backend=engine)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, frozen_cross_entropy(hidden.to(dtype), WEIGHT, None, LABELS, backend=engine))
    loss.backward()
    assert hidden.grad.dtype == torch.float32


def test_backward_runs_where_forward_ran(monkeypatch):
    names, select = [], dispatch.select
    monkeypatch.setattr(dispatch, "select", lambda *args: names.append(args[2]) or select(*args))
    hidden = torch.randn(M, D, requires_grad=True)
    with dispatch.use_backend("eager"):
        loss = frozen_cross_entropy(hidden, WEIGHT, None, LABELS)
    loss.backward()
    assert names == ["eager", "eager"]


def test_inference_mode(engine):
    hidden = torch.randn(M, D)
    loss = frozen_cross_entropy(hidden, WEIGHT, None, LABELS, backend=engine)
    assert loss.grad_fn is None
    with torch.inference_mode():
        assert torch.equal(frozen_cross_entropy(hidden, WEIGHT, None, LABELS, backend=engine), loss)


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


def test_forked_child(own_kernels, threads):
    threads(2)
    values = cases.head(40, 4500, 70, torch.float32)
    weight, hidden = quantize_int8(values["weight"]), values["hidden"].clone().requires_grad_()
    ones = torch.ones(40)

    def run():
        losses = frozen_cross_entropy(hidden, weight, None, values["labels"], reduction="none", backend=own_kernels)
        # Compared as bytes: torch's own threaded ops are what a forked child must not call.
        return [t.detach().numpy().tobytes() for t in (losses, *torch.autograd.grad(losses, hidden, ones))]

    expected = run()  # the parent's thread pool is up
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that waits for the parent's threads would wait for ever
        os._exit(0 if run() == expected else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert run() == expected


def test_concurrent_calls(own_kernels, threads):
    threads(2)
    jobs = [(SHAPES[i % 3], (torch.float32, torch.bfloat16)[i % 2]) for i in range(6)]
    expected = [_run(own_kernels, *job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda job: _run(own_kernels, *job), jobs))
    assert all(_equal(a, b) for a, b in zip(expected, found, strict=True))
