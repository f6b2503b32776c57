"""Where softmax losses break: underflow, overflow, cancellation, ties with zero, NaN and Inf."""

from __future__ import annotations

import math

import cases
import pytest
import torch
from torch import nan

from limber_fast import info_nce
from limber_fast.reference.info_nce import info_nce as reference


def _gradients(function, image, text, scale, **options):
    leaves = [x.clone().requires_grad_() for x in (image, text, torch.as_tensor(scale, dtype=torch.float32))]
    if function is reference:
        leaves = [x.detach().double().requires_grad_() for x in leaves]
    loss = function(*leaves, **options)
    loss = loss[0] if isinstance(loss, tuple) else loss
    return loss.detach(), *torch.autograd.grad(loss.sum(), leaves)


def test_similarities_below_a_fixed_shift(engine, poisoned):
    image, text, scale = cases.towers("below", 257, 257, 64, torch.float32)
    assert (image @ text.T).max() < -0.04
    for found, true in zip(_gradients(info_nce, image, text, scale, backend=engine),
                           _gradients(reference, image, text, scale), strict=True):  # fmt: skip
        assert cases.errors(found, true)[0] < 1e-5


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_logits_of_ten_thousand_stay_finite(engine, poisoned, dtype):
    image, text, _ = cases.towers("unit", 123, 123, 64, dtype)
    for found in _gradients(info_nce, image * 10, text * 10, 100.0, backend=engine):
        assert found.isfinite().all()


def test_log_sum_exp_keeps_its_digits_at_large_logits(engine):
    image, text, _ = cases.towers("unit", 123, 123, 64, torch.float32)
    stats = info_nce(image * 10, text * 10, 100.0, logit_bias=5.0, return_stats=True, backend=engine)[1]
    true = reference(image.double() * 10, text.double() * 10, 100.0, logit_bias=5.0)[1]
    for name in ("image_log_sum_exp", "text_log_sum_exp"):
        assert cases.errors(getattr(stats, name), true[name])[1] < 4 * torch.finfo(torch.float32).eps


def test_small_losses_keep_their_relative_precision(engine, poisoned):
    image, text, scale = cases.towers("converged", 123, 123, 640, torch.float32)
    found = info_nce(image, text, scale, reduction="none", backend=engine)
    true = reference(image.double(), text.double(), scale, reduction="none")[0]
    assert true.max() < 1e-9
    torch.testing.assert_close(found.double(), true, rtol=1e-3, atol=0)
    gradients = _gradients(info_nce, image, text, scale, backend=engine)[1:]
    for found, true in zip(gradients, _gradients(reference, image, text, scale)[1:], strict=True):
        assert cases.errors(found, true)[0] < 1e-3


def test_scale_gradient_under_a_shared_offset(engine, poisoned):
    image, text, scale = cases.towers("offset", 321, 321, 96, torch.float32)
    found = _gradients(info_nce, image, text, scale, backend=engine)[3]
    assert cases.errors(found, _gradients(reference, image, text, scale)[3])[0] < 1e-4


@pytest.mark.parametrize("scale", [0.0, -5.0, 1e-20])
def test_scales_that_are_not_positive(engine, poisoned, scale):
    image, text, _ = cases.towers("unit", 123, 123, 40, torch.float32)
    found = _gradients(info_nce, image, text, scale, backend=engine)
    for x, true in zip(found, _gradients(reference, image, text, scale), strict=True):
        torch.testing.assert_close(x.double(), true, rtol=1e-5, atol=1e-6 * true.abs().max().item() + 1e-30)
    if scale == 0:
        assert found[0].item() == pytest.approx(math.log(123), rel=1e-6)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_one_pair_has_no_loss(engine, poisoned, dtype):
    image, text, scale = cases.towers("unit", 1, 1, 40, dtype)
    for found in _gradients(info_nce, image, text, scale, backend=engine):
        assert (found == 0).all()


def test_rows_whose_candidates_are_all_masked(engine, poisoned):
    image, text, scale = cases.towers("unit", 9, 9, 40, torch.float32)
    ids = torch.zeros(9, dtype=torch.int64)
    for found in _gradients(info_nce, image, text, scale, ids=ids, backend=engine):
        assert (found == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_zero_rows_under_normalize(engine, poisoned, dtype):
    image, text, scale = cases.towers("unit", 33, 33, 40, dtype)
    image, text = image.clone(), text.clone()
    image[3], text[5] = 0, 0
    found = _gradients(info_nce, image, text, scale, normalize=True, backend=engine)
    true = _gradients(reference, image, text, scale, normalize=True)
    rtol = 1e-5 if dtype == torch.float32 else 0.03
    assert cases.errors(found[0], true[0])[0] < 1e-3
    for x, y, zero in zip(found[1:3], true[1:3], (3, 5), strict=True):
        others = torch.arange(33) != zero
        # torch.nn.functional.normalize divides such a row, and its gradient, by eps = 1e-12.
        assert cases.errors(x[zero], y[zero])[0] < rtol and cases.errors(x[others], y[others])[0] < rtol


def test_tiny_and_huge_rows_under_normalize(engine, poisoned):
    image, text, scale = cases.towers("unit", 33, 33, 40, torch.float32)
    sizes = 10 ** torch.linspace(-14, 14, 33)[:, None]
    found = _gradients(info_nce, image * sizes, text, scale, normalize=True, backend=engine)
    true = _gradients(reference, image * sizes, text, scale, normalize=True)
    assert cases.errors(found[0], true[0])[0] < 1e-6
    for i in range(33):
        assert cases.errors(found[1][i], true[1][i])[0] < 1e-5, i


@pytest.mark.parametrize("cache_mb", [0, 256])
@pytest.mark.parametrize("towers_scale, loss_scale", [(1.0, 1e-28), (1.0, 1e25), (1e-18, 1.0), (1e16, 1.0)])
def test_sizes_that_bf16_parts_do_not_hold(engine, poisoned, towers_scale, loss_scale, cache_mb):
    """AMX multiplies fp32 in bf16 parts, the smallest 2^-16 of a value: none may vanish or overflow."""
    image, text, scale = cases.towers("unit", 70, 70, 48, torch.float32)
    image, text, scale = image * towers_scale, text * towers_scale, scale / towers_scale**2
    leaves = [x.requires_grad_() for x in (image, text)]
    loss = info_nce(*leaves, scale, backend=engine, cache_mb=cache_mb) * loss_scale
    true_leaves = [x.detach().double().requires_grad_() for x in leaves]
    true = reference(*true_leaves, scale)[0] * loss_scale
    pairs = zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(true, true_leaves), strict=True)
    for found, expected in pairs:
        assert cases.errors(found, expected)[0] < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant, symmetric", [("softmax", True), ("softmax", False), ("sigmoid", False)])
@pytest.mark.parametrize("value", [nan, math.inf, -math.inf])
@pytest.mark.parametrize("tower", [0, 1])
def test_nan_and_inf_propagate_as_in_eager(engine, poisoned, tower, value, variant, symmetric, dtype):
    """NaN: exactly eager's places, in the losses and in each gradient. Infinity: the losses are finite exactly where
    eager's are; gradients may lose more than eager's, which find an infinity times zero in other places, never less.
    """
    inputs = [x.clone() for x in cases.towers("unit", 123, 123, 40, dtype)[:2]]
    inputs[tower][77, 3] = value
    options = {"variant": variant, "symmetric": symmetric}
    found = _gradients(info_nce, *inputs, 9.0, **options, reduction="none", backend=engine)
    # torch's bf16 products on AMX spoil the row beside a NaN where K is odd: own kernels are held to fp32's places.
    same = inputs if engine == "eager" else [x.float() for x in inputs]
    eager = _gradients(cases.eager_info_nce, *same, 9.0, **options)
    if math.isnan(value):
        for x, y in zip(found, eager, strict=True):
            assert torch.equal(x.isnan(), y.isnan())
        return
    assert torch.equal(found[0].isfinite(), eager[0].isfinite())
    for x, y in zip(found[1:], eager[1:], strict=True):
        assert (x.isfinite() <= y.isfinite()).all(), "a gradient that eager loses looks sound"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant, symmetric", [("softmax", True), ("softmax", False), ("sigmoid", False)])
@pytest.mark.parametrize("largest", [1e6, 3e7, 1e9, 1e14])
@pytest.mark.parametrize("tower", [0, 1])
def test_one_row_of_huge_logits(engine, poisoned, tower, largest, variant, symmetric, dtype):
    """Finite logits that exceed what their neighbours' exponents can share: sound wherever eager is."""
    inputs = [x.clone() for x in cases.towers("unit", 123, 123, 40, dtype)[:2]]
    row = inputs[tower][77]
    row *= largest / (9 * (inputs[1 - tower].double() @ row.double()).max().item())
    options = {"variant": variant, "symmetric": symmetric}
    found = _gradients(info_nce, *inputs, 9.0, **options, reduction="none", backend=engine)
    eager = _gradients(cases.eager_info_nce, *inputs, 9.0, **options)
    true = _gradients(reference, *inputs, 9.0, **options, reduction="none")
    others = torch.arange(123) != 77
    factor = 4 if engine == "eager" and dtype != torch.float32 else 2  # test_info_nce_values.py says why
    for name, x, y, z in zip(("loss", "image", "text", "scale"), found, eager, true, strict=True):
        assert (x.isfinite() >= y.isfinite()).all(), name
        floor = cases.FLOOR[torch.float32 if name == "loss" else dtype]
        for part in [...] if name == "scale" else [..., others]:  # the huge row would hide the others
            for error, of_eager in zip(cases.errors(x[part], z[part]), cases.errors(y[part], z[part]), strict=True):
                assert error <= factor * of_eager + floor, (name, error, of_eager)


def test_long_batch_is_summed_in_a_fixed_order(engine, threads):
    n = 40000
    towers = torch.randn(2, n, 1, generator=torch.Generator().manual_seed(1))
    labels = torch.zeros(n, dtype=torch.int64)
    losses = []
    for count in (1, 2, 3):
        threads(count)
        losses.append(info_nce(towers[0], towers[1, :3], 3.0, labels=labels, symmetric=False, backend=engine))
    assert losses[0] == losses[1] == losses[2]
