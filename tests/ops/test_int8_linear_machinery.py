"""torch.library registration, torch.compile, autocast and dispatch."""

from __future__ import annotations

import pytest
import torch

from limber_fast import dispatch, int8_linear, quantize_int8
from limber_fast.reference.int8_linear import gelu_new
from limber_fast.reference.int8_linear import int8_linear as reference

FORWARD, BACKWARD = torch.ops.limber_fast.int8_linear_fwd.default, torch.ops.limber_fast.int8_linear_bwd.default
M, N, K = 3, 37, 70
WEIGHT = quantize_int8(torch.randn(N, K, generator=torch.Generator().manual_seed(1)))

CALLS = {  # bias, residual, activation, compute, keep
    "plain": (False, False, None, "w8a16", False),
    "all": (True, True, "gelu_new", "w8a8", False),
    "kept": (True, False, "gelu_new", "w8a16", True),
}


def _arguments(engine: str, call: str, requires_grad: bool) -> tuple:
    bias, residual, activation, compute, keep = CALLS[call]
    return (
        torch.randn(M, K).requires_grad_(requires_grad), *WEIGHT.buffers(), torch.randn(N) if bias else None,
        torch.randn(M, N).requires_grad_(requires_grad) if residual else None, activation, compute, 6.0, keep, engine,
    )  # fmt: skip


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_opcheck_forward(engine, call, requires_grad):
    torch.library.opcheck(FORWARD, _arguments(engine, call, requires_grad))


@pytest.mark.parametrize("activation", [False, True])
def test_opcheck_backward(engine, activation):
    z = torch.randn(M, N) if activation else None
    torch.library.opcheck(
        BACKWARD, (torch.randn(M, N), WEIGHT.packed, WEIGHT.scales, WEIGHT.column_sums, z, engine)
    )


def _step(x, weight, bias, residual, **options):
    return int8_linear(x * 1.5, weight, bias, residual=residual, **options) * 2


# What is compiled ends at the op: one instruction set stands for all.
@pytest.mark.parametrize("engine, compiler", [("eager", "aot_eager"), ("cpu", "inductor")])
def test_compile_whole_graph_with_dynamic_shapes(engine, compiler):
    torch._dynamo.reset()
    compiled = torch.compile(_step, fullgraph=True, dynamic=True, backend=compiler)
    bias = torch.randn(N)
    for m in (2, 3, 5):
        x, residual = torch.randn(m, 2, K, requires_grad=True), torch.randn(m, 2, N, requires_grad=True)
        for options in ({}, {"activation": "gelu_new", "compute": "w8a8"}):
            results = []
            for function in (compiled, _step):
                y = function(x, WEIGHT, bias, residual, **options, backend=engine)
                results.append((y, *torch.autograd.grad(y.square().sum(), (x, residual))))
            for found, true in zip(*results, strict=True):
                torch.testing.assert_close(found, true)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_a_linear_does(engine, dtype):
    x, residual = torch.randn(M, K, requires_grad=True), torch.randn(M, N, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        y = int8_linear(x, WEIGHT, residual=residual, backend=engine)
    same = int8_linear(x.to(dtype), WEIGHT, residual=residual.to(dtype), backend=engine)
    assert y.dtype == dtype and torch.equal(y, same)
    y.float().square().sum().backward()
    assert x.grad.dtype == torch.float32 and residual.grad.dtype == torch.float32


def test_inference_mode_and_frozen_calls(engine):
    x = torch.randn(M, K)
    with torch.autograd.graph.saved_tensors_hooks(pytest.fail, pytest.fail):
        y = int8_linear(x, WEIGHT, activation="gelu_new", backend=engine)
    assert y.grad_fn is None
    with torch.inference_mode():
        assert torch.equal(int8_linear(x, WEIGHT, activation="gelu_new", backend=engine), y)


def test_a_residual_alone_may_need_its_gradient(engine):
    x, residual = torch.randn(M, K), torch.randn(M, N, requires_grad=True)
    y = int8_linear(x, WEIGHT, activation="gelu_new", residual=residual, backend=engine)
    grad = torch.randn(M, N)
    assert torch.equal(torch.autograd.grad(y, residual, grad)[0], grad)


def test_backward_runs_where_forward_ran(monkeypatch):
    names, select = [], dispatch.select
    monkeypatch.setattr(dispatch, "select", lambda *args: names.append(args[2]) or select(*args))
    x = torch.randn(M, K, requires_grad=True)
    with dispatch.use_backend("eager"):
        y = int8_linear(x, WEIGHT)
    y.sum().backward()
    assert names == ["eager", "eager"]


def test_reference_is_linear_and_gelu():
    """The float64 oracle itself, against torch's own."""
    x = torch.randn(M, K, dtype=torch.float64)
    weight, bias = WEIGHT.dequantize(torch.float64), torch.randn(N, dtype=torch.float64)
    expected = torch.nn.functional.gelu(torch.nn.functional.linear(x, weight, bias), approximate="tanh")
    found = reference(x, WEIGHT.integers(), WEIGHT.scales, bias, activation="gelu_new")
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gelu_new(x), torch.nn.functional.gelu(x, approximate="tanh"))
