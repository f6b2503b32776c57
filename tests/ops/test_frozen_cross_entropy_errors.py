"""Every broken contract is one clear error: op, argument, contract, found, remedy."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from limber_fast import BackendUnavailable, Int8Weight, frozen_cross_entropy, quantize_int8

HIDDEN, WEIGHT, BIAS, LABELS = torch.randn(2, 5), quantize_int8(torch.randn(4, 5)), torch.randn(4), torch.tensor([3, 0])
CALL = {"hidden": HIDDEN, "weight": WEIGHT, "bias": BIAS, "labels": LABELS}

BAD_VALUES = {
    "hidden of other D": (dict(hidden=HIDDEN[:, :3]), r"hidden must be \[..., D\] with the D = 5 of weight; got shape"),
    "hidden without dimensions": (
        dict(hidden=HIDDEN[0, 0]),
        r"hidden must be \[..., D\] with the D = 5 of weight; got",
    ),
    "hidden on meta": (dict(hidden=HIDDEN.to("meta")), r"hidden must hold data; got a tensor on meta; materialise it"),
    "weight elsewhere": (dict(weight=Int8Weight(4, 5, device="meta")), r"hidden must be on the device of weight, meta"),
    "bias of other V": (dict(bias=BIAS[:3]), r"bias must be \[V\] with the V = 4 of weight; got shape \(3,\)"),
    "trained bias": (dict(bias=BIAS.clone().requires_grad_()), r"bias must be frozen; got a tensor that requires grad"),
    "labels of other rows": (
        dict(labels=LABELS[:1]),
        r"labels must be \(2,\), one per row of hidden; got shape \(1,\)",
    ),
    "labels elsewhere": (dict(labels=LABELS.to("meta")), r"labels must be on the device of hidden, cpu; got meta"),
    "label beyond V": (
        dict(labels=torch.tensor([3, 4])),
        r"labels must lie in \[0, V\) with V = 4, or be ignore_index = -100; got 4; they name rows of weight",
    ),
    "negative label": (dict(labels=torch.tensor([-1, -100])), r"labels must lie in \[0, V\) .*-100; got -1"),
    "another ignore_index": (dict(labels=torch.tensor([-100, 1]), ignore_index=-1), r"labels must lie .*-1; got -100"),
    "unknown reduction": (dict(reduction="max"), r"reduction must be one of 'mean', 'sum', 'none'; got 'max'"),
    "unknown backend": (dict(backend="tpu"), r"backend must be one of 'auto', .* got 'tpu'"),
}

BAD_KINDS = {
    "hidden of numbers": (dict(hidden=[1.0]), r"hidden must be a tensor \[..., D\]; got list; convert it"),
    "integer hidden": (dict(hidden=HIDDEN.long()), r"hidden must be fp16, bf16, fp32 or fp64; got torch.int64"),
    "sparse hidden": (dict(hidden=HIDDEN.to_sparse()), r"hidden must be a dense tensor \[..., D\]; got torch.sparse_c"),
    "a plain weight": (dict(weight=torch.ones(4, 5)), r"weight must be an Int8Weight; got torch.float32; make one"),
    "integer bias": (dict(bias=BIAS.long()), r"bias must be fp16, bf16, fp32 or fp64; got torch.int64"),
    "labels of numbers": (dict(labels=[3, 0]), r"labels must be a tensor \[...\]; got list; convert it"),
    "probabilities": (dict(labels=LABELS.float()), r"labels must be an integer tensor; got torch.float32; convert it"),
    "ignore_index of a float": (dict(ignore_index=-100.0), r"ignore_index must be an integer; got float"),
}


@pytest.mark.parametrize("change, message", BAD_VALUES.values(), ids=BAD_VALUES)
def test_values_and_shapes(change, message):
    with pytest.raises(ValueError, match="^frozen_cross_entropy: " + message):
        frozen_cross_entropy(**(CALL | change))


@pytest.mark.parametrize("change, message", BAD_KINDS.values(), ids=BAD_KINDS)
def test_dtypes_and_kinds(change, message):
    with pytest.raises(TypeError, match="^frozen_cross_entropy: " + message):
        frozen_cross_entropy(**(CALL | change))


def test_labels_are_checked_on_every_backend(engine):
    with pytest.raises(ValueError, match=r"labels must lie in \[0, V\) with V = 4"):
        frozen_cross_entropy(**(CALL | {"labels": torch.tensor([0, 99])}), backend=engine)


def test_named_backend_never_falls_back():
    for name in ("triton", "cuda"):
        with pytest.raises(BackendUnavailable, match=f"frozen_cross_entropy: backend '{name}' cannot run this call"):
            frozen_cross_entropy(**CALL, backend=name)
    with pytest.raises(BackendUnavailable, match="cpu: computes in float32, bfloat16 and float16; got float64"):
        frozen_cross_entropy(**(CALL | {"hidden": HIDDEN.double()}), backend="cpu")
    with pytest.raises(BackendUnavailable, match="cpu: sums at most 65536 products exactly; got 65537"):
        wide = Int8Weight(1, 65537)
        frozen_cross_entropy(torch.zeros(1, 65537), wide, None, torch.zeros(1).long(), backend="cpu")


def test_second_derivative_is_refused(engine):
    hidden = HIDDEN.clone().requires_grad_()
    losses = frozen_cross_entropy(hidden, WEIGHT, BIAS, LABELS, reduction="none", backend=engine)
    (gradient,) = torch.autograd.grad(losses.square().sum(), hidden, create_graph=True)
    with pytest.raises(
        RuntimeError, match=r"^frozen_cross_entropy: its gradient cannot be differentiated again; .*refe"
    ):
        gradient.sum().backward()


@pytest.mark.parametrize("requires_grad", [False, True])
def test_vmap_is_refused(requires_grad):
    hidden = torch.randn(3, 2, 5, requires_grad=requires_grad)
    with pytest.raises(
        RuntimeError, match=r"^frozen_cross_entropy: torch.vmap is not supported; hidden has batch dime"
    ):
        torch.vmap(lambda rows: frozen_cross_entropy(rows, WEIGHT, BIAS, LABELS))(hidden)


@pytest.mark.parametrize("leaf", [False, True])
def test_forward_mode_is_refused(engine, leaf):
    hidden = HIDDEN.clone().requires_grad_(leaf)
    with (
        forward_ad.dual_level(),
        pytest.raises(
            RuntimeError, match=r"^frozen_cross_entropy: forward-mode differentiation is not supported; .*ref"
        ),
    ):
        dual = forward_ad.make_dual(hidden, torch.ones_like(hidden))
        frozen_cross_entropy(**(CALL | {"hidden": dual}), backend=engine)


def test_functional_transforms_are_refused():
    with pytest.raises(
        RuntimeError, match=r"^frozen_cross_entropy: torch.func transforms are not supported; use torch"
    ):
        torch.func.grad(lambda hidden: frozen_cross_entropy(hidden, WEIGHT, BIAS, LABELS))(HIDDEN)
