"""hypothesis: any shapes, ranges and options agree with the reference, and obey identities."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from limber_fast import int8_linear, quantize_int8
from limber_fast.reference.int8_linear import int8_linear as reference

# The engine fixture is the same for every example, so one per test function is right.
PROFILE = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SIZES = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 129, 257]))


def _call(m, n, k, seed, decades):
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(m, k, generator=generator), torch.randn(n, k, generator=generator)
    rows = 10.0 ** (decades * (torch.rand(m, 1, generator=generator) - 0.5))
    return x * rows, quantize_int8(weight), torch.randn(n, generator=generator)


@PROFILE
@given(m=SIZES, n=SIZES, k=SIZES, seed=st.integers(0, 2**20), decades=st.integers(0, 20),
       threshold=st.sampled_from([0.0, 0.7, 6.0]))  # fmt: skip
def test_eight_bits_agree_with_the_reference(engine, m, n, k, seed, decades, threshold):
    x, weight, _ = _call(m, n, k, seed, decades)
    found = int8_linear(x, weight, compute="w8a8", outlier_threshold=threshold, backend=engine)
    true = reference(x.double(), weight.integers(), weight.scales, compute="w8a8", outlier_threshold=threshold)
    # Row by row: the rows' sizes lie decades apart.
    size = (x.double().abs() @ weight.dequantize(torch.float64).abs().T).amax(1, keepdim=True)
    assert ((found - true).abs() <= 1e-6 * size).all()


@PROFILE
@given(m=SIZES, n=SIZES, k=SIZES, seed=st.integers(0, 2**20), decades=st.integers(0, 20))
def test_gradient_is_the_adjoint(engine, m, n, k, seed, decades):
    """<grad, W dx> = <W^T grad, dx>, each side with its own 16-bit rounding."""
    x, weight, _ = _call(m, n, k, seed, decades)
    x.requires_grad_()
    y = int8_linear(x, weight, backend=engine)
    grad = torch.randn(m, n, generator=torch.Generator().manual_seed(seed + 1))
    (d,) = torch.autograd.grad(y, x, grad)
    direct, adjoint = (grad.double() * y.double()).sum(), (d.double() * x.detach().double()).sum()
    size = grad.double().norm(dim=1) @ x.detach().double().norm(dim=1) * weight.dequantize().norm()
    assert (direct - adjoint).abs() <= 1e-4 * size


@PROFILE
@given(m=SIZES, n=SIZES, k=SIZES, seed=st.integers(0, 2**20), shift=st.integers(-12, 12))
def test_powers_of_two_pass_through(engine, m, n, k, seed, shift):
    """Fixed point is relative to the row: y(2^s x) = 2^s y(x), bit by bit."""
    x, weight, _ = _call(m, n, k, seed, 0)
    y = int8_linear(x, weight, backend=engine)
    if engine != "eager":
        assert torch.equal(int8_linear(x * 2.0**shift, weight, backend=engine), y * 2.0**shift)
    torch.testing.assert_close(int8_linear(-x, weight, backend=engine), -y, rtol=1e-3, atol=float(y.abs().max()) * 1e-3)


@PROFILE
@given(m=SIZES, n=SIZES, k=SIZES, seed=st.integers(0, 2**20))
def test_epilogue_is_gelu_of_the_sum_plus_the_residual(engine, m, n, k, seed):
    x, weight, bias = _call(m, n, k, seed, 0)
    residual = torch.randn(m, n, generator=torch.Generator().manual_seed(seed + 2))
    product = int8_linear(x, weight, backend=engine).double()
    expected = torch.nn.functional.gelu(product + bias, approximate="tanh") + residual
    found = int8_linear(x, weight, bias, activation="gelu_new", residual=residual, backend=engine)
    # Of the terms, which may cancel.
    size = torch.stack([product.abs().max(), bias.abs().max(), residual.abs().max()]).max()
    assert (found - expected).abs().max() <= 1e-6 * size
