"""Loss and d hidden against float64 over the dequantised integers: at most twice the error of eager PyTorch in the same
dtype, with the floor that 16-bit activations set."""

from __future__ import annotations

from functools import cache

import cases
import pytest
import torch
import torch.nn.functional as F

from limber_fast import frozen_cross_entropy, quantize_int8
from limber_fast.reference.frozen_cross_entropy import frozen_cross_entropy as reference

FIXED_POINT = 3e-4  # tests/ops/test_int8_linear_values.py
FLOOR = {dtype: max(floor, FIXED_POINT) for dtype, floor in cases.FLOOR.items()}
SHAPES = cases.HEAD_SHAPES


@cache
def _weight(shape, dtype):
    return quantize_int8(cases.head(*shape, dtype)["weight"])


def _run(function, values, dtype, reduction, bias=True):
    hidden = values["hidden"].to(dtype).requires_grad_()
    loss = function(hidden, values["bias"].to(dtype) if bias else None, values["labels"], reduction)
    grad = values["grad"].to(loss.dtype) if reduction == "none" else torch.tensor(-1.5, dtype=loss.dtype)
    return {"loss": loss.detach(), "hidden": torch.autograd.grad(loss, hidden, grad)[0]}


def _true(shape, dtype, reduction, bias=True):
    weight = _weight(shape, dtype)

    def function(hidden, bias, labels, reduction):
        return reference(hidden, weight.integers(), weight.scales, bias, labels, reduction=reduction)

    return _run(function, cases.head(*shape, dtype), torch.float64, reduction, bias)


def _eager(shape, dtype, reduction, bias=True):
    weight = _weight(shape, dtype).dequantize(dtype)
    return _run(lambda hidden, *rest: cases.eager_cross_entropy(hidden, weight, *rest), cases.head(*shape, dtype),
                dtype, reduction, bias)  # fmt: skip


def _found(engine, shape, dtype, reduction, bias=True):
    weight = _weight(shape, dtype)

    def function(hidden, bias, labels, reduction):
        return frozen_cross_entropy(hidden, weight, bias, labels, reduction=reduction, backend=engine)

    return _run(function, cases.head(*shape, dtype), dtype, reduction, bias)


def _within(found, true, eager, dtype):
    for name, x in found.items():
        assert x.shape == true[name].shape and x.dtype == (torch.float32 if name == "loss" else dtype)
        bound = zip(cases.errors(x, true[name]), cases.errors(eager[name], true[name]), strict=True)
        for error, allowed in bound:
            assert error <= 2 * allowed + FLOOR[dtype], (name, error, allowed)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_row_and_its_gradient(engine, poisoned, shape, dtype):
    call = (shape, dtype, "none")
    _within(_found(engine, *call), _true(*call), _eager(*call), dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions(engine, poisoned, reduction, dtype, bias):
    call = (SHAPES[4], dtype, reduction, bias)
    _within(_found(engine, *call), _true(*call), _eager(*call), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)  # fp16 has no numbers that small
def test_a_model_that_is_certain_and_right(engine, poisoned, dtype):
    """Losses down to 1e-12, and their gradients, to 1e-3 of themselves: 1 - p is not a difference."""
    generator = torch.Generator().manual_seed(5)
    weight = quantize_int8(torch.randn(5000, 96, generator=generator))
    labels = torch.randint(0, 5000, (24,), generator=generator)
    towards = weight.dequantize()[labels]
    hidden = (towards * torch.linspace(0.2, 0.45, 24)[:, None]).to(dtype).requires_grad_()
    losses = frozen_cross_entropy(hidden, weight, None, labels, reduction="none", backend=engine)
    (found,) = torch.autograd.grad(losses.sum(), hidden)
    wide = hidden.detach().double().requires_grad_()
    true = reference(wide, weight.integers(), weight.scales, None, labels, reduction="none")
    (gradient,) = torch.autograd.grad(true.sum(), wide)
    assert true.min() < 1e-9 and true.max() > 1e-4
    # A logit of 40 in 16-bit fixed point errs by 1e-3, bf16 products by 40 * 2^-9.
    limit = 0.3 if engine == "eager" and dtype == torch.bfloat16 else 1e-2
    assert ((losses - true).abs() <= limit * true).all()
    assert ((found.double() - gradient).norm(dim=1) <= limit * gradient.norm(dim=1)).all()


def test_maximum_in_every_chunk(engine, poisoned):
    """Logits that rise, fall and jump along the vocabulary: sums are rescaled, tiny ones vanish against huge ones."""
    v, d = 13000, 64
    place = torch.linspace(-1, 1, v)
    shapes = {"rises": place, "falls": -place, "peak": -place.abs(), "valley": place.abs(), "flat": 0 * place}
    labels = torch.tensor([0, v - 1, v // 2, 5000, 4096])
    for name, bias in shapes.items():
        for size in (1.0, 90.0, 3000.0):
            values = cases.head(len(labels), v, d, torch.float32)
            weight = _weight((len(labels), v, d), torch.float32)
            hidden = values["hidden"].clone().requires_grad_()
            losses = frozen_cross_entropy(hidden, weight, size * bias, labels, reduction="none", backend=engine)
            (found,) = torch.autograd.grad(losses.sum(), hidden)
            wide = values["hidden"].double().requires_grad_()
            true = reference(wide, weight.integers(), weight.scales, (size * bias).double(), labels, reduction="none")
            (gradient,) = torch.autograd.grad(true.sum(), wide)
            torch.testing.assert_close(losses.double(), true, rtol=1e-4, atol=1e-4)
            assert max(cases.errors(found, gradient)) <= FIXED_POINT * 4, (name, size)


def test_layouts_labels_and_ignore_index(engine, poisoned):
    shape = (60, 333, 70)
    values, weight = cases.head(*shape, torch.float32), _weight(shape, torch.float32)
    labels = values["labels"]

    def run(hidden, labels, **options):
        leaf = hidden.detach().requires_grad_()
        loss = frozen_cross_entropy(leaf, weight, values["bias"], labels, backend=engine, **options)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0].reshape(shape[0], shape[2])

    hidden = values["hidden"]
    plain = run(hidden, labels)
    others = {
        "batch dimensions": run(hidden.reshape(3, 20, 70), labels.reshape(3, 20)),
        "slices": run(torch.cat([hidden, hidden], 1)[:, :70], torch.stack([labels, labels], 1)[:, 0]),
        "transposed": run(hidden.T.contiguous().T, labels),
        "int32 labels": run(hidden, labels.int()),
        "another mark": run(hidden, labels.masked_fill(labels == -100, -1), ignore_index=-1),
    }
    for name, found in others.items():
        assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True)), name


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(3,), (0,), (2, 0)], ids=str)
def test_no_label_at_all(engine, poisoned, shape, reduction):
    weight = _weight((60, 333, 70), torch.float32)
    hidden = torch.randn(*shape, 70, requires_grad=True)
    labels = torch.full(shape, -100)
    found = frozen_cross_entropy(hidden, weight, None, labels, reduction=reduction, backend=engine)
    expected = F.cross_entropy(torch.zeros(labels.numel(), 333), labels.flatten(), reduction=reduction)
    torch.testing.assert_close(found, expected.reshape(found.shape), equal_nan=True)
    found.sum().backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_one_row_and_a_vocabulary_of_one(engine, poisoned):
    weight = _weight((60, 333, 70), torch.float32)
    hidden = torch.randn(70)
    alone = frozen_cross_entropy(hidden, weight, None, torch.tensor(5), backend=engine)
    assert alone.shape == () and torch.equal(
        alone, frozen_cross_entropy(hidden[None], weight, None, torch.tensor([5]), backend=engine)
    )
    hidden = torch.randn(3, 70, requires_grad=True)
    only = frozen_cross_entropy(hidden, quantize_int8(torch.randn(1, 70)), None, torch.zeros(3).long(), backend=engine)
    only.backward()
    assert only == 0 and torch.equal(hidden.grad, torch.zeros(3, 70))


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", ["hidden", "a bias", "the label's bias", "every bias"])
def test_nan_and_inf_propagate_as_in_eager(engine, poisoned, place, value, rows):
    """Row by row as cross entropy in fp32 has it; -inf in the bias takes a token out of the vocabulary."""
    shape = (rows, 4500, 70)
    values, weight = cases.head(*shape, torch.float32), _weight(shape, torch.float32)
    hidden, bias = values["hidden"].clone(), values["bias"].clone()
    labels = torch.full((rows,), 17)
    labels[1] = -100
    if place == "hidden":
        hidden[1:3, 5] = value
    else:
        bias[{"a bias": slice(4400, 4402), "the label's bias": 17, "every bias": slice(None)}[place]] = value
    results = []
    for function in (
        lambda x: frozen_cross_entropy(x, weight, bias, labels, reduction="none", backend=engine),
        lambda x: cases.eager_cross_entropy(x, weight.dequantize(), bias, labels, "none"),
    ):
        leaf = hidden.detach().requires_grad_()
        losses = function(leaf)
        results.append((losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]))
    (losses, found), (expected, gradient) = results
    assert torch.equal(found[1], torch.zeros(70))  # a row without a label has a gradient of 0, whatever it holds
    found, gradient = found[labels >= 0], gradient[labels >= 0]
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-3, equal_nan=True)
    assert torch.equal(found.isnan(), gradient.isnan())
    torch.testing.assert_close(found, gradient, rtol=1e-2, atol=2e-3, equal_nan=True)


def test_only_labels_and_the_gradient_are_saved(engine):
    values = cases.head(40, 333, 70, torch.float32)
    weight = quantize_int8(values["weight"])
    before = {name: x.clone() for name, x in weight.state_dict().items()}
    hidden, saved = values["hidden"].clone().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = frozen_cross_entropy(hidden, weight, values["bias"], values["labels"], reduction="sum", backend=engine)
    assert sorted(tuple(t.shape) for t in saved) == [(40,), (40, 70)]
    loss.backward()
    assert all(torch.equal(before[name], value) for name, value in weight.state_dict().items())
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(pytest.fail, pytest.fail):
        frozen = frozen_cross_entropy(hidden, weight, values["bias"], values["labels"], reduction="sum", backend=engine)
    assert torch.equal(frozen, loss)


def test_float64_runs_on_eager():
    values = cases.head(9, 333, 70, torch.float64)
    weight = quantize_int8(values["weight"])
    hidden = values["hidden"].clone().requires_grad_()
    found = frozen_cross_entropy(hidden, weight, values["bias"], values["labels"])
    true = reference(hidden, weight.integers(), weight.scales, values["bias"], values["labels"])
    torch.testing.assert_close(found, true, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(found, hidden), torch.autograd.grad(true, hidden), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_reference_is_cross_entropy():
    """The float64 oracle itself, against torch's own."""
    values = cases.head(40, 333, 70, torch.float64)
    weight = quantize_int8(values["weight"])
    hidden = values["hidden"].clone().requires_grad_()
    for reduction in ("mean", "sum", "none"):
        z = F.linear(hidden, weight.dequantize(torch.float64), values["bias"])
        true = F.cross_entropy(z, values["labels"], reduction=reduction)
        found = reference(hidden, weight.integers(), weight.scales, values["bias"], values["labels"],
                          reduction=reduction)  # fmt: skip
        torch.testing.assert_close(found, true)
        for a, b in zip(*(torch.autograd.grad(x.sum(), hidden) for x in (found, true)), strict=True):
            torch.testing.assert_close(a, b)
