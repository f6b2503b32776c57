"""y and dx against float64 over the dequantised integers: at most twice the error of eager PyTorch in the same dtype,
with a floor that the 16-bit activations set; w8a8 against its own integers, to fp32 rounding."""

from __future__ import annotations

from functools import cache

import cases
import pytest
import torch
from torch import Tensor

from limber_fast import int8_linear, quantize_int8
from limber_fast.reference.int8_linear import int8_linear as reference

# 16-bit fixed point: a step of at most 64 root mean squares / 65535, and gelu_new's slope of up to 1.13.
FIXED_POINT = 3e-4
FLOOR = {dtype: max(floor, FIXED_POINT) for dtype, floor in cases.FLOOR.items()}
EPILOGUES = {
    "bare": (False, None, False), "bias": (True, None, False), "gelu": (True, "gelu_new", False),
    "residual": (False, None, True), "all": (True, "gelu_new", True),
}  # fmt: skip


CALLS = [("all", shape) for shape in cases.INT8_SHAPES]
CALLS += [(epilogue, shape) for epilogue in EPILOGUES for shape in ((2, 96, 4100), (67, 161, 71)) if epilogue != "all"]


@cache
def _weight(shape: tuple[int, int, int], dtype: torch.dtype):
    return quantize_int8(cases.int8_layer(*shape, dtype)["weight"])


def _run(function, values: dict[str, Tensor], epilogue: str, dtype: torch.dtype) -> dict[str, Tensor]:
    bias, activation, residual = EPILOGUES[epilogue]
    leaves = [values["x"].detach().to(dtype).requires_grad_()]
    leaves += [values["residual"].detach().to(dtype).requires_grad_()] if residual else []
    y = function(leaves[0], values["bias"].to(dtype) if bias else None, activation, leaves[1] if residual else None)
    gradients = torch.autograd.grad(y, leaves, values["grad"].to(dtype))
    return {"y": y.detach(), **dict(zip(("x", "residual"), gradients, strict=False))}


def _true(shape, dtype, epilogue, compute):
    weight = _weight(shape, dtype)

    def function(x, bias, activation, residual):
        return reference(x, weight.integers(), weight.scales, bias, activation=activation, residual=residual,
                         compute=compute)  # fmt: skip

    return _run(function, cases.int8_layer(*shape, dtype), epilogue, torch.float64)


def _eager(shape, dtype, epilogue):
    weight = _weight(shape, dtype).dequantize(dtype)
    return _run(lambda x, *rest: cases.eager_int8_linear(x, weight, *rest), cases.int8_layer(*shape, dtype), epilogue,
                dtype)  # fmt: skip


def _found(engine, shape, dtype, epilogue, compute):
    weight = _weight(shape, dtype)

    def function(x, bias, activation, residual):
        return int8_linear(x, weight, bias, activation=activation, residual=residual, compute=compute, backend=engine)

    return _run(function, cases.int8_layer(*shape, dtype), epilogue, dtype)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("epilogue, shape", CALLS, ids=str)
def test_w8a16(engine, poisoned, epilogue, shape, dtype):
    true, eager = _true(shape, dtype, epilogue, "w8a16"), _eager(shape, dtype, epilogue)
    for name, found in _found(engine, shape, dtype, epilogue, "w8a16").items():
        assert found.dtype == dtype and found.shape == true[name].shape
        bound = zip(cases.errors(found, true[name]), cases.errors(eager[name], true[name]), strict=True)
        for error, allowed in bound:
            assert error <= 2 * allowed + FLOOR[dtype], (name, error, allowed)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("epilogue, shape", CALLS, ids=str)
def test_w8a8(engine, poisoned, epilogue, shape, dtype):
    """The same integers as the reference: what is left is the epilogue's rounding, and the result's."""
    true = _true(shape, dtype, epilogue, "w8a8")
    found = _found(engine, shape, dtype, epilogue, "w8a8")
    assert max(cases.errors(found["y"], true["y"])) <= cases.FLOOR[dtype]
    assert max(cases.errors(found["x"], true["x"])) <= 2 * FLOOR[dtype]


@pytest.mark.parametrize("shape", [(67, 161, 71), (5, 900, 300), (40, 2200, 130)], ids=str)
def test_gradient_points_the_same_way(engine, poisoned, shape):
    true = _true(shape, torch.bfloat16, "all", "w8a16")["x"]
    found = _found(engine, shape, torch.bfloat16, "all", "w8a16")["x"]
    assert torch.cosine_similarity(found.double().flatten(), true.flatten(), dim=0) >= 0.999


@pytest.mark.parametrize("compute", ["w8a16", "w8a8"])
def test_outliers_of_every_size_keep_their_precision(engine, compute):
    """One element above all the others: rounding the row to its range would leave nothing of them."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(9, 2048, generator=generator)
    for row, size in enumerate((6, 40, 1e3, 1e4, 1e6, -1e4, -6, 1e-3)):
        x[row, 100 + row] = size
    weight = quantize_int8(torch.randn(70, 2048, generator=generator).index_fill_(1, torch.arange(100, 110), 0))
    found = int8_linear(x, weight, compute=compute, backend=engine)
    true = reference(x.double(), weight.integers(), weight.scales, compute="w8a16")
    error = (found.double() - true).norm(dim=1) / true.norm(dim=1)
    assert error.max() <= {"w8a16": 3e-4, "w8a8": 2e-2}[compute]


@pytest.mark.parametrize("threshold", [0.0, 1e-9, 0.5, 3.0, 6.0, 1e30])
def test_threshold(engine, poisoned, threshold):
    values = cases.int8_layer(16, 65, 1023, torch.float32)
    weight = _weight((16, 65, 1023), torch.float32)
    found = int8_linear(values["x"], weight, compute="w8a8", outlier_threshold=threshold, backend=engine)
    true = reference(values["x"].double(), weight.integers(), weight.scales, compute="w8a8",
                     outlier_threshold=threshold)  # fmt: skip
    assert max(cases.errors(found, true)) <= 1e-6


def test_float64_runs_on_eager():
    values = cases.int8_layer(5, 31, 130, torch.float64)
    weight = quantize_int8(values["weight"])
    found = int8_linear(values["x"], weight, values["bias"], activation="gelu_new")
    true = reference(values["x"], weight.integers(), weight.scales, values["bias"], activation="gelu_new")
    torch.testing.assert_close(found, true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 33, 65), (40, 96, 130)], ids=str)
def test_layouts(engine, poisoned, shape, dtype):
    values, weight = cases.int8_layer(*shape, dtype), _weight(shape, dtype)
    m, n, k = shape

    def run(x, residual, grad, spread=lambda y: y):
        leaf = x.detach().requires_grad_()
        y = int8_linear(leaf, weight, activation="gelu_new", residual=residual, backend=engine)
        return y.detach().reshape(m, n), torch.autograd.grad(spread(y), leaf, grad)[0].reshape(m, k)

    plain = run(values["x"], values["residual"], values["grad"])
    x, residual, grad = values["x"], values["residual"], values["grad"]
    others = {
        "batch dimensions": run(x.reshape(1, m, 1, k), residual.reshape(1, m, 1, n), grad.reshape(1, m, 1, n)),
        "slices": run(torch.cat([x, x], 1)[:, :k], torch.cat([residual, residual], 1)[:, n:], grad),
        "transposed": run(x.T.contiguous().T, residual.T.contiguous().T, grad.T, lambda y: y.T),
    }
    for name, found in others.items():
        assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True)), name


def test_one_vector_and_no_rows(engine, poisoned):
    values, weight = cases.int8_layer(5, 31, 130, torch.float32), _weight((5, 31, 130), torch.float32)
    alone = int8_linear(values["x"][1], weight, backend=engine)
    assert alone.shape == (31,)
    empty = values["x"][:0].clone().requires_grad_()
    y = int8_linear(empty, weight, activation="gelu_new", backend=engine)
    assert y.shape == (0, 31)
    y.sum().backward()
    assert empty.grad.shape == (0, 130)


@pytest.mark.parametrize("compute", ["w8a16", "w8a8"])
@pytest.mark.parametrize("m", [1, 4, 30])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", ["x", "bias", "residual", "grad"])
def test_nan_and_inf_propagate_as_in_eager(engine, poisoned, place, value, m, compute):
    shape = (m, 65, 1100)
    values = {name: x.detach().clone() for name, x in cases.int8_layer(*shape, torch.float32).items()}
    values[place].view(-1)[-2] = value
    weight = _weight(shape, torch.float32)
    x = values["x"].requires_grad_()
    arguments = {"residual": values["residual"]}
    y = int8_linear(x, weight, values["bias"], compute=compute, backend=engine, **arguments)
    (found,) = torch.autograd.grad(y, x, values["grad"])
    eager = cases.eager_int8_linear(x, weight.dequantize(), values["bias"], None, values["residual"])
    (expected,) = torch.autograd.grad(eager, x, values["grad"])
    assert torch.equal(y.isfinite(), eager.isfinite()) and torch.equal(y.isnan(), eager.isnan())
    assert torch.equal(found.isfinite(), expected.isfinite())


@pytest.mark.parametrize("activation", [None, "gelu_new"])
def test_weight_is_untouched_and_inputs_are_not_saved(engine, activation):
    values = cases.int8_layer(40, 96, 130, torch.float32)
    weight = quantize_int8(values["weight"])
    before = {name: x.clone() for name, x in weight.state_dict().items()}
    x, saved = values["x"].clone().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = int8_linear(x, weight, values["bias"], activation=activation, backend=engine)
    mine = {t.data_ptr() for t in weight.buffers()}
    extra = [t for t in saved if t.data_ptr() not in mine]
    assert [tuple(t.shape) for t in extra] == ([] if activation is None else [(40, 96)])
    torch.optim.SGD([x], 0.1).zero_grad()
    y.square().sum().backward()
    assert all(torch.equal(before[name], value) for name, value in weight.state_dict().items())
