"""ClipLoss and SigLipLoss against open_clip's own classes."""

from __future__ import annotations

import inspect

import cases
import pytest
import torch

import limber_fast

open_clip = pytest.importorskip("open_clip.loss")


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
@pytest.mark.parametrize("bias", [None, -10.0])
@pytest.mark.parametrize("n, d", [(1, 8), (123, 64)])
def test_equal_to_open_clip(engine, poisoned, name, bias, n, d):
    image, text, scale = cases.towers("unit", n, n, d, torch.float32)
    results = []
    for loss in (getattr(limber_fast, name)(backend=engine), getattr(open_clip, name)()):
        leaves = [image.clone(), text.clone(), torch.tensor(scale)] + ([] if bias is None else [torch.tensor(bias)])
        leaves = [x.requires_grad_() for x in leaves]
        value = loss(*leaves, *([None] if bias is None else []), output_dict=True)["contrastive_loss"]
        gradients = torch.autograd.grad(value, leaves, allow_unused=True)
        results.append((value, *(torch.zeros(()) if g is None else g for g in gradients)))
    for found, true in zip(*results, strict=True):
        torch.testing.assert_close(found, true, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_signatures(name):
    mine, theirs = getattr(limber_fast, name), getattr(open_clip, name)

    def positional(function):
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.default) for p in parameters if p.kind != p.KEYWORD_ONLY]

    assert positional(mine.__init__) == positional(theirs.__init__)
    names = [p for p, _ in positional(theirs.forward)]
    assert [p for p, _ in positional(mine.forward)] == names
    assert isinstance(mine(), torch.nn.Module) and not list(mine().parameters())


def test_output():
    x = torch.eye(4)
    loss = limber_fast.ClipLoss()(x, x, 1.0)
    assert loss.ndim == 0 and limber_fast.ClipLoss()(x, x, 1.0, output_dict=True) == {"contrastive_loss": loss}


@pytest.mark.parametrize("name, arguments, message", [
    ("ClipLoss", {"world_size": 2, "rank": 1}, "torch.distributed must be initialised"),
    ("SigLipLoss", {"world_size": 2}, "torch.distributed must be initialised"),
    ("SigLipLoss", {"rank": 1}, "rank must be 0 where world_size is 1; got 1"),
    ("ClipLoss", {"use_horovod": True}, "use_horovod must be False; got True"),
])  # fmt: skip
def test_processes_that_are_not_there_are_refused(name, arguments, message):
    with pytest.raises(ValueError, match=f"^{name}: {message}"):
        getattr(limber_fast, name)(**arguments)


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
@pytest.mark.parametrize("options, error, message", [
    ({"backend": "x"}, ValueError, "backend must be one of 'auto', .* got 'x'"),
    ({"cache_mb": -1}, ValueError, "cache_mb must not be negative"),
    ({"cache_mb": None}, TypeError, "cache_mb must be a number"),
])  # fmt: skip
def test_bad_options_are_refused_at_construction(name, options, error, message):
    with pytest.raises(error, match=f"^{name}: {message}"):
        getattr(limber_fast, name)(**options)


def test_options_reach_the_op():
    loss = limber_fast.ClipLoss(backend="cuda", cache_mb=0)
    with pytest.raises(limber_fast.BackendUnavailable):
        loss(torch.eye(4), torch.eye(4), 1.0)
    assert "cache_mb=0" in repr(loss)
