"""An op's call past the dispatcher: the same results, and whoever has to see the op still does."""

from __future__ import annotations

from typing import ClassVar

import cases
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from limber_fast import info_nce
from limber_fast.ops import registration

FORWARD, BACKWARD = torch.ops.limber_fast.info_nce_fwd.default, torch.ops.limber_fast.info_nce_bwd.default


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops.append(op)
        return op(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    seen: ClassVar[list] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


def step():
    image, text, scale = cases.unit(33, 33, 48)
    inputs = [image.requires_grad_(), text.requires_grad_(), torch.tensor(scale, requires_grad=True)]
    loss = info_nce(*inputs)
    return loss.detach(), *torch.autograd.grad(loss, inputs)


def test_the_same_results_with_and_without_the_dispatcher(monkeypatch):
    direct = step()
    monkeypatch.setattr(registration, "_watched", lambda inputs: True)
    for a, b in zip(direct, step(), strict=True):
        assert torch.equal(a, b)


def test_nobody_watching_means_no_dispatch(monkeypatch):
    kernel, calls = registration._KERNELS[FORWARD], []
    monkeypatch.setitem(registration._KERNELS, FORWARD, lambda *inputs: calls.append(0) or kernel(*inputs))
    step()
    assert len(calls) == 1


def test_a_dispatch_mode_sees_both_ops():
    with Recorder() as recorder:
        step()
    assert FORWARD in recorder.ops and BACKWARD in recorder.ops


def test_a_profiler_sees_both_ops():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    names = {event.key for event in profile.key_averages()}
    assert {"limber_fast::info_nce_fwd", "limber_fast::info_nce_bwd"} <= names


def test_a_subclass_sees_the_op():
    image, text, scale = cases.unit(33, 33, 48)
    Subclass.seen.clear()
    info_nce(image.as_subclass(Subclass), text, scale)
    assert FORWARD in Subclass.seen
