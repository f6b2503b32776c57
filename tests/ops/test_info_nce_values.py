"""Loss and every gradient against float64: at most twice the error of eager PyTorch in the same dtype."""

from __future__ import annotations

from functools import cache

import cases
import pytest
import torch
from torch import Tensor

from limber_fast import info_nce
from limber_fast.reference.info_nce import info_nce as reference

NAMES = ("loss_per_row", "loss", "image", "text", "logit_scale", "logit_bias")
OPTIONS = {
    "clip": {},
    "rectangular": {"symmetric": False},
    "permuted": {},
    "siglip": {"variant": "sigmoid"},
    "normalize": {"normalize": True},
}


def _inputs(kind: str, data: str, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[list[Tensor], dict]:
    n, m, d = shape
    image, text, scale = cases.towers(data, n, m, d, dtype)
    if kind == "normalize":
        image, text = image * 3, text * 0.2
    options = dict(OPTIONS[kind])
    if kind == "permuted":
        options["labels"] = cases.permutation(n)
    elif n != m:
        options["labels"] = cases.labels(n, m)
    return [image, text, torch.tensor(scale), torch.tensor(-2.0)], options


def _run(function, inputs: list[Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Per-row loss, mean loss and gradients of `function(image, text, scale, bias) -> per-row loss`."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    rows = function(*leaves)
    gradients = torch.autograd.grad(rows.mean(), leaves)
    return dict(zip(NAMES, (rows.detach(), rows.detach().mean(), *gradients), strict=True))


@cache
def _truth(kind: str, data: str, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[dict, dict, float]:
    """float64 results, those of eager PyTorch in `dtype`, and the largest similarity: d scale is a mean of those."""
    inputs, options = _inputs(kind, data, shape, dtype)

    def exact(image, text, scale, bias):
        return reference(image, text, scale, logit_bias=bias, reduction="none", **options)[0]

    def eager(image, text, scale, bias):
        return cases.eager_info_nce(image, text, scale, logit_bias=bias, **options)

    terms = inputs[0].double() @ inputs[1].double().T
    return _run(exact, inputs, torch.float64), _run(eager, inputs), terms.abs().max().item()


def _check(engine: str, kind: str, data: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    inputs, options = _inputs(kind, data, shape, dtype)
    true, eager, terms = _truth(kind, data, shape, dtype)

    def fused(image, text, scale, bias):
        return info_nce(image, text, scale, logit_bias=bias, reduction="none", backend=engine, **options)

    found = _run(fused, inputs)
    # In 16 bits the eager engine draws from the same roundings as the yardstick, and on data that amplifies them luck
    # decides by more than 2. A softmax turns one rounding of a logit, 2^-24 of the scale, into that relative error.
    factor = 4 if engine == "eager" and dtype != torch.float32 else 2
    fp32 = max(cases.FLOOR[torch.float32], 2**-24 * inputs[2].item())
    floor = max(cases.FLOOR[dtype], fp32)
    for name in ("loss_per_row", "image", "text"):
        bound = zip(cases.errors(found[name], true[name]), cases.errors(eager[name], true[name]), strict=True)
        for error, of_eager in bound:
            assert error <= factor * of_eager + (fp32 if name == "loss_per_row" else floor), (name, error, of_eager)
    # One number may be right by luck in eager: its errors are bounded by those of the terms that it adds up.
    rows = (eager["loss_per_row"].double() - true["loss_per_row"]).abs().mean()
    assert (found["loss"] - true["loss"]).abs() <= factor * rows + fp32 * true["loss"].abs()
    of_eager = (eager["logit_scale"] - true["logit_scale"]).abs()
    largest = max(terms, true["logit_scale"].abs())
    assert (found["logit_scale"] - true["logit_scale"]).abs() <= factor * of_eager + floor * largest
    if kind == "siglip":
        of_eager = (eager["logit_bias"] - true["logit_bias"]).abs()
        assert (found["logit_bias"] - true["logit_bias"]).abs() <= factor * of_eager + floor * true["logit_bias"].abs()
    else:
        assert found["logit_bias"] == 0


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("shape", cases.SQUARE, ids=str)
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_square(engine, poisoned, kind, shape, dtype):
    _check(engine, kind, "unit", shape, dtype)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [s for s in cases.SQUARE if s[2] > 1], ids=str)  # D = 1: a sign, whose gradient is 0
def test_normalize(engine, poisoned, shape, dtype):
    _check(engine, "normalize", "unit", shape, dtype)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("shape", cases.RECTANGULAR, ids=str)
@pytest.mark.parametrize("kind", ["rectangular", "siglip"])
def test_rectangular(engine, poisoned, kind, shape, dtype):
    _check(engine, kind, "unit", shape, dtype)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("data", cases.DATA)
@pytest.mark.parametrize("kind", ["clip", "permuted", "siglip"])
def test_data(engine, poisoned, kind, data, dtype):
    _check(engine, kind, data, (321, 321, 96), dtype)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_large(engine, poisoned, dtype):
    _check(engine, "clip", "unit", cases.LARGE, dtype)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("cache_mb", [0, 0.25, 256])
def test_cache_does_not_change_the_result(engine, poisoned, dtype, cache_mb):
    inputs, _ = _inputs("clip", "unit", (640, 640, 123), dtype)
    true, eager, _ = _truth("clip", "unit", (640, 640, 123), dtype)
    leaves = [x.requires_grad_() for x in (inputs[0].clone(), inputs[1].clone())]
    gradients = torch.autograd.grad(info_nce(*leaves, inputs[2], cache_mb=cache_mb, backend=engine), leaves)
    for name, found in zip(("image", "text"), gradients, strict=True):
        assert cases.errors(found, true[name])[0] <= 2 * cases.errors(eager[name], true[name])[0] + cases.FLOOR[dtype]


def test_reference_is_cross_entropy():
    """The float64 oracle itself, against torch's own losses."""
    inputs, _ = _inputs("clip", "unit", (123, 123, 64), torch.float64)
    image, text, scale, bias = (x.double() for x in inputs)
    for options in ({}, {"labels": cases.permutation(123)}, {"variant": "sigmoid"}, {"normalize": True}):
        mine = reference(image, text, scale, logit_bias=bias, reduction="none", **options)[0]
        logits_in_fp32 = cases.eager_info_nce(image, text, scale, logit_bias=bias, **options)
        torch.testing.assert_close(mine, logits_in_fp32.double(), rtol=1e-5, atol=1e-6)
    smooth = reference(image, text, scale, label_smoothing=0.1, symmetric=False)[0]
    torch_smooth = torch.nn.functional.cross_entropy(scale * image @ text.T, torch.arange(123), label_smoothing=0.1)
    torch.testing.assert_close(smooth, torch_smooth)
