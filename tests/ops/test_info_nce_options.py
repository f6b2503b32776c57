"""Every option, alone and together, against the float64 reference; layouts, frozen towers and statistics."""

from __future__ import annotations

from fractions import Fraction
from importlib import import_module
from math import inf

import cases
import numpy as np
import pytest
import torch

from limber_fast import info_nce
from limber_fast.reference.info_nce import info_nce as reference

N, D = 123, 40
IDS = torch.randint(40, (N,), generator=torch.Generator().manual_seed(1))
EXTRA = cases.towers("unit", 29, 29, D, torch.float32)[0]
WEIGHTS = torch.rand(N, generator=torch.Generator().manual_seed(2))

OPTIONS = {
    "labels": {"labels": cases.permutation(N)},
    "labels one way": {"labels": cases.labels(N, N), "symmetric": False},
    "ids": {"ids": IDS},
    "ids of a pair": {"ids": (IDS, IDS.flip(0))},
    "ids and labels": {"ids": (IDS, IDS.flip(0)), "labels": cases.permutation(N)},
    "ids of 64 bits": {"ids": IDS * 2**40 - 2**50},
    "ids of 8 bits": {"ids": IDS.to(torch.uint8)},
    "ids all equal": {"ids": torch.zeros(N, dtype=torch.int32)},
    "extra negatives": {"extra_negatives": EXTRA},
    "extra negatives one way": {"extra_negatives": EXTRA, "symmetric": False},
    "smoothing": {"label_smoothing": 0.1},
    "smoothing and ids": {"label_smoothing": 0.2, "ids": IDS, "extra_negatives": EXTRA},
    "weights": {"weights": WEIGHTS},
    "weights and labels": {"weights": WEIGHTS.double(), "labels": cases.permutation(N)},
    "normalize": {"normalize": True, "extra_negatives": EXTRA},
    "sigmoid": {"variant": "sigmoid"},
    "sigmoid and all": {"variant": "sigmoid", "ids": IDS, "extra_negatives": EXTRA, "normalize": True,
                        "labels": cases.labels(N, N), "weights": WEIGHTS},
    "all": {"labels": cases.permutation(N), "ids": IDS, "extra_negatives": EXTRA, "weights": WEIGHTS,
            "label_smoothing": 0.1, "normalize": True},
}  # fmt: skip


def _both(engine, options, *, reduction="mean", n=N, m=N, d=D, dtype=torch.float32, return_stats=False):
    """(loss, gradients) of the op and of the float64 reference; the upstream gradient is not uniform."""
    image, text, _ = cases.towers("unit", n, m, d, dtype)
    results = []
    for kind in (dtype, torch.float64):
        leaves = {"image": image * 1.5, "text": text * 0.7, "logit_scale": torch.tensor(9.0),
                  "logit_bias": torch.tensor(-3.0), "extra_negatives": options.get("extra_negatives")}  # fmt: skip
        leaves = {name: x.to(kind).requires_grad_() for name, x in leaves.items() if x is not None}
        call = {**options, **leaves, "reduction": reduction}
        loss = info_nce(**call, backend=engine, return_stats=return_stats) if kind == dtype else reference(**call)
        loss, stats = loss if isinstance(loss, tuple) else (loss, None)
        upstream = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
        gradients = torch.autograd.grad((loss * upstream).sum(), list(leaves.values()), allow_unused=True)
        results.append((loss.detach(), dict(zip(leaves, gradients, strict=True)), stats))
    return results


def _close(found, true, rtol=2e-5):
    true = torch.zeros(()) if true is None else true
    torch.testing.assert_close(found.double(), true.double(), rtol=rtol, atol=rtol * true.abs().max().item())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(engine, poisoned, name, reduction):
    (loss, gradients, _), (true_loss, true_gradients, _) = _both(engine, OPTIONS[name], reduction=reduction)
    _close(loss, true_loss)
    for argument, true in true_gradients.items():
        if argument == "logit_bias" and "sigmoid" not in name:
            assert gradients[argument] == 0
        else:
            _close(gradients[argument], true)


@pytest.mark.parametrize("name", OPTIONS)
def test_statistics(engine, poisoned, name):
    (_, _, stats), (_, _, true) = _both(engine, OPTIONS[name], return_stats=True)
    assert not any(x is not None and x.requires_grad for x in stats)
    for field, found in stats._asdict().items():
        assert (found is None) == (true[field] is None), field
        if found is not None:
            _close(found, true[field])


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_few_texts_and_many_extra_negatives(engine, poisoned, dtype):
    n = m = 32
    options = {"extra_negatives": cases.towers("unit", 3000, 1, D, dtype)[0]}
    (loss, gradients, _), (true_loss, true_gradients, _) = _both(engine, options, n=n, m=m, dtype=dtype)
    rtol = 2e-5 if dtype == torch.float32 else 2e-2
    _close(loss, true_loss, rtol)
    for argument in ("image", "text", "extra_negatives", "logit_scale"):
        _close(gradients[argument], true_gradients[argument], rtol)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize(
    "options, n, m",
    [
        ({}, N, N),
        ({"extra_negatives": 3000}, 32, 32),
        ({"variant": "sigmoid", "normalize": True}, N, N),
        ({"symmetric": False, "extra_negatives": 29}, 300, 50),
    ],
)
def test_cache_on_and_off_agree(engine, poisoned, options, n, m, dtype):
    image, text, scale = cases.towers("unit", n, m, D, dtype)
    options = dict(options, labels=cases.permutation(n) if n == m else cases.labels(n, m))
    if "extra_negatives" in options:
        options["extra_negatives"] = cases.towers("unit", options["extra_negatives"], 1, D, dtype)[0]
    results = []
    for cache_mb in (0, 0.05, 256, inf):
        leaves = [x.clone().requires_grad_() for x in (image, text)]
        loss = info_nce(*leaves, scale, **options, cache_mb=cache_mb, backend=engine)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for cached in results[1:]:
        for found, plain in zip(cached, results[0], strict=True):
            assert cases.errors(found, plain)[0] < 2 * cases.FLOOR[dtype]


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["all", "sigmoid and all"])
def test_default_dtype_does_not_matter(engine, poisoned, name, default):
    results = []
    for dtype in (torch.float32, default):
        torch.set_default_dtype(dtype)
        try:
            loss, gradients, stats = _with_statistics(engine, OPTIONS[name])
        finally:
            torch.set_default_dtype(torch.float32)
        results.append([loss, *gradients, *(x for x in stats if x is not None)])
    for found, plain in zip(*results, strict=True):
        assert found.dtype == plain.dtype and torch.equal(found, plain)


def _with_statistics(engine, options):
    image, text, _ = cases.towers("unit", N, N, D, torch.float32)
    leaves = [x.clone().requires_grad_() for x in (image, text)]
    loss, stats = info_nce(*leaves, 9.0, logit_bias=-3.0, **options, return_stats=True, backend=engine)
    return loss.detach(), torch.autograd.grad(loss, leaves), stats


@pytest.mark.parametrize("n, m", [(50, 123), (123, 50), (1, 9)])
def test_rectangular_with_ids_and_weights(engine, poisoned, n, m):
    options = {"labels": cases.labels(n, m), "symmetric": False, "ids": (IDS[:n], IDS.flip(0)[:m]),
               "weights": WEIGHTS[:n], "extra_negatives": EXTRA, "label_smoothing": 0.1}  # fmt: skip
    (loss, gradients, _), (true_loss, true_gradients, _) = _both(engine, options, n=n, m=m)
    _close(loss, true_loss)
    for argument in ("image", "text", "extra_negatives", "logit_scale"):
        _close(gradients[argument], true_gradients[argument])


def test_ties_count_as_wrong(engine):
    image = torch.eye(4)
    stats = info_nce(image, image[[0, 1, 2, 2]], 5.0, return_stats=True, backend=engine)[1]
    assert (stats.image_accuracy, stats.text_accuracy) == (0.5, 0.75)


LAYOUTS = {
    "transposed": lambda x: x.T.contiguous().T,
    "every second row": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "columns of a wider matrix": lambda x: torch.cat([x, x + 1], dim=1)[:, : x.shape[1]],
    "every second feature": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "unaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(engine, poisoned, layout, dtype):
    image, text, scale = cases.towers("unit", N, N, D, dtype)
    results = []
    for view in (lambda x: x, LAYOUTS[layout]):
        leaves = [view(x).detach().requires_grad_() for x in (image, text)]
        loss = info_nce(*leaves, scale, backend=engine)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for found, plain in zip(*results, strict=True):
        torch.testing.assert_close(found, plain, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


def test_expanded_rows(engine, poisoned):
    row = torch.randn(1, D, generator=torch.Generator().manual_seed(3))
    image, text = row.expand(9, D), cases.towers("unit", 9, 9, D, torch.float32)[1]
    torch.testing.assert_close(
        info_nce(image, text, 3.0, backend=engine), info_nce(image.contiguous(), text, 3.0, backend=engine)
    )


def test_one_tensor_for_both_towers(engine, poisoned):
    x = cases.towers("unit", N, N, D, torch.float32)[0].clone().requires_grad_()
    (found,) = torch.autograd.grad(info_nce(x, x, 10.0, backend=engine), x)
    wide = x.detach().double().requires_grad_()
    _close(found, torch.autograd.grad(reference(wide, wide, 10.0)[0], wide)[0])


@pytest.mark.parametrize("frozen", ["image", "text", "both"])
def test_frozen_towers_cost_nothing(engine, frozen, monkeypatch):
    module = import_module(f"limber_fast.backends.{engine}")
    calls, budgets = [], []
    forward, backward = module.info_nce_fwd, module.info_nce_bwd
    monkeypatch.setattr(module, "info_nce_fwd", lambda *a, **k: budgets.append(k["cache_bytes"]) or forward(*a, **k))
    monkeypatch.setattr(module, "info_nce_bwd", lambda *a, **k: calls.append(k) or backward(*a, **k))
    image, text, _ = cases.towers("unit", N, N, D, torch.float32)
    leaves = {"image": image.clone(), "text": text.clone(), "scale": torch.tensor(9.0, requires_grad=True)}
    for name in ("image", "text"):
        leaves[name].requires_grad_(frozen not in (name, "both"))
    info_nce(*leaves.values(), backend=engine).backward()
    for name in ("image", "text"):
        assert (leaves[name].grad is None) == (frozen in (name, "both"))
    assert leaves["scale"].grad is not None
    assert (budgets[0] == 0) == (frozen == "both")
    if frozen == "both":
        assert not calls
    else:
        assert (calls[0]["need_image"], calls[0]["need_text"]) == (frozen != "image", frozen != "text")


@pytest.mark.parametrize("scale", [9, 9.0, torch.tensor(9.0), torch.tensor([9.0]), torch.full((1, 1), 9.0).bfloat16(),
                                   torch.tensor(9.0, dtype=torch.float64), np.float32(9), np.int64(9), np.array(9.0),
                                   Fraction(9)], ids=repr)  # fmt: skip
def test_logit_scale_kinds(engine, scale):
    image, text, _ = cases.towers("unit", N, N, D, torch.float32)
    leaf = scale.clone().requires_grad_() if isinstance(scale, torch.Tensor) else scale
    loss = info_nce(image, text, leaf, backend=engine)
    torch.testing.assert_close(loss, info_nce(image, text, 9.0, backend=engine))
    if isinstance(leaf, torch.Tensor):
        loss.backward()
        assert (leaf.grad.shape, leaf.grad.dtype) == (leaf.shape, leaf.dtype)


def test_float64_runs_eager():
    (loss, gradients, _), (true_loss, true_gradients, _) = _both("auto", OPTIONS["all"], dtype=torch.float64)
    assert loss.dtype == torch.float64
    _close(loss, true_loss, rtol=1e-12)
    _close(gradients["image"], true_gradients["image"], rtol=1e-11)
    _close(gradients["logit_scale"], true_gradients["logit_scale"], rtol=1e-11)
