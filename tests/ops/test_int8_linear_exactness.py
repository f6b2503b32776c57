"""Integer sums without an error at the extremes of every operand, on every instruction set, in both passes."""

from __future__ import annotations

import os

import pytest
import torch

from limber_fast import Int8Weight, int8_linear, native, quantize_int8

# With x = scale * integer and unit weight scales the result is the integer sum, as fp32 rounds it.
PATTERNS = (("largest", "largest"), ("least", "largest"), ("alternating", "alternating"), ("random", "random"))
SHAPES = [(1, 33, 20480), (4, 32, 4160), (18, 31, 20480), (60, 70, 2050)]


def _integers(pattern: str, *shape: int) -> torch.Tensor:
    if pattern == "random":
        return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(sum(shape)))
    q = torch.full(shape, 127 if pattern != "least" else -127)
    if pattern == "alternating":
        q[:, 1::2] *= -1
    return q


def _weight(q: torch.Tensor) -> Int8Weight:
    """Of scale 1: each channel and each column holds a 127."""
    weight = quantize_int8(q.float())
    assert torch.equal(weight.integers(), q.to(torch.int8)) and (weight.scales == 1).all()
    return weight


def _sums(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return x.double() @ q.double().T


@pytest.mark.parametrize("of_weight, of_x", PATTERNS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_eight_bits(own_kernels, poisoned, shape, of_weight, of_x):
    m, n, k = shape
    q = _integers(of_weight, n, k)
    q[:, 0] = 127  # an absmax of 127 whatever the pattern
    x = (_integers(of_x, m, k) + 127).clamp(0, 255)  # every step is exactly 1
    x[:, 0], x[:, 1] = 255, 0
    y = int8_linear(x.float(), _weight(q), compute="w8a8", outlier_threshold=0, backend=own_kernels)
    assert torch.equal(y, _sums(x, q).float())


@pytest.mark.parametrize("of_weight, of_x", PATTERNS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sixteen_bits_and_the_gradient(own_kernels, poisoned, shape, of_weight, of_x):
    """Both digits at their extremes: the two integer sums are exact, the sum of both rounds once or twice."""
    m, n, k = shape
    q = _integers(of_weight, n, k)
    q[:, 0] = 127
    x = _integers(of_x, m, k) * 257 + 32639 + _integers("random", m, k) // 64
    x = x.clamp(0, 65535)
    x[:, 0], x[:, 1] = 65535, 0
    y = int8_linear(x.float(), _weight(q), backend=own_kernels)
    true = _sums(x, q)
    scale = 127.0 * x.double().abs().sum(1, keepdim=True)
    assert ((y - true).abs() <= 2**-23 * scale).all()
    # The same sums backwards: the weight's columns are reduced.
    leaf = torch.zeros(m, n, requires_grad=True)
    q[0, :], q[:, 0] = 127, 127
    back = int8_linear(leaf, _weight(q.T.contiguous()), backend=own_kernels)
    (d,) = torch.autograd.grad(back, leaf, x.float())
    assert ((d - _sums(x, q)).abs() <= 2**-23 * scale).all()


@pytest.mark.parametrize("gelu", [None, "gelu_new"])
@pytest.mark.parametrize("shape", [(1, 70, 300), (5, 64, 1500), (40, 130, 4200)], ids=str)
def test_instruction_sets_find_the_same_integers(monkeypatch, shape, gelu):
    """w8a8 agrees between instruction sets up to the rounding of the float epilogue."""
    m, n, k = shape
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(m, k, generator=generator) * 3, quantize_int8(torch.randn(n, k, generator=generator))
    results = []
    for isa in native.available_isas():
        monkeypatch.setitem(os.environ, native.ISA_VARIABLE, isa)
        results.append(int8_linear(x, weight, activation=gelu, compute="w8a8", backend="cpu"))
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], rtol=2e-6, atol=2e-6 * float(results[0].abs().max()))


def test_reduction_beyond_exact_sums_is_refused(own_kernels):
    from limber_fast import BackendUnavailable

    weight = Int8Weight(1, 65537)
    with pytest.raises(BackendUnavailable, match="cpu: sums at most 65536 products exactly; got 65537"):
        int8_linear(torch.zeros(1, 65537), weight, backend=own_kernels)


def test_sixteen_bits_of_the_longest_reduction(own_kernels):
    k = 65536
    q = torch.full((2, k), 127)
    x = torch.full((1, k), 65535.0)
    x[0, 0] = 0
    y = int8_linear(x, _weight(q), backend=own_kernels)
    assert torch.equal(y, _sums(x, q).float().expand_as(y))
