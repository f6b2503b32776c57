"""torch.library registration, torch.compile, autocast and dispatch."""

from __future__ import annotations

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
