"""Every broken contract is one clear error: op, argument, contract, found, remedy."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from limber_fast import BackendUnavailable, int8_linear, quantize_int8

X, WEIGHT, BIAS, RESIDUAL = torch.randn(2, 5), quantize_int8(torch.randn(4, 5)), torch.randn(4), torch.randn(2, 4)
CALL = {"x": X, "weight": WEIGHT, "bias": BIAS, "residual": RESIDUAL}

BAD_VALUES = {
    "x of other K": (dict(x=X[:, :3]), r"x must be \[..., K\] with the K = 5 of weight; got shape \(2, 3\)"),
    "x without dimensions": (dict(x=X[0, 0]), r"x must be \[..., K\] with the K = 5 of weight; got shape \(\)"),
    "x on meta": (dict(x=X.to("meta")), r"x must hold data; got a tensor on meta; materialise it"),
    "weight elsewhere": (dict(weight=WEIGHT.__class__(4, 5, device="meta")), r"x must be on the device of weight, met"),
    "bias of other N": (dict(bias=BIAS[:3]), r"bias must be \[N\] with the N = 4 of weight; got shape \(3,\)"),
    "trained bias": (
        dict(bias=BIAS.clone().requires_grad_()),
        r"bias must be frozen; got a tensor that requires grad; no gradient reaches it: detach it, or add a trained bi",
    ),
    "residual of other N": (dict(residual=X), r"residual must be \(2, 4\), the shape of the result; got shape"),
    "unknown activation": (dict(activation="relu"), r"activation must be one of 'gelu_new'; got 'relu'"),
    "unknown compute": (dict(compute="w4a16"), r"compute must be one of 'w8a16', 'w8a8'; got 'w4a16'"),
    "negative threshold": (dict(outlier_threshold=-1.0), r"outlier_threshold must not be negative; got -1.0; 0 turns"),
    "threshold of NaN": (dict(outlier_threshold=float("nan")), r"outlier_threshold must not be negative; got nan"),
    "unknown backend": (dict(backend="tpu"), r"backend must be one of 'auto', .* got 'tpu'"),
}

BAD_KINDS = {
    "x of numbers": (dict(x=[1.0]), r"x must be a tensor \[..., K\]; got list; convert it: torch.as_tensor"),
    "integer x": (dict(x=X.long()), r"x must be fp16, bf16, fp32 or fp64; got torch.int64"),
    "sparse x": (dict(x=X.to_sparse()), r"x must be a dense tensor \[..., K\]; got torch.sparse_coo"),
    "a plain weight": (
        dict(weight=torch.ones(4, 5)),
        r"weight must be an Int8Weight; got torch.float32; make one: limber_fast.quantize_int8\(weight\)",
    ),
    "integer bias": (dict(bias=BIAS.long()), r"bias must be fp16, bf16, fp32 or fp64; got torch.int64"),
    "residual of other dtype": (dict(residual=RESIDUAL.half()), r"residual must have the dtype of x, torch.float32; g"),
    "fp64 in w8a8": (
        dict(x=X.double(), residual=None, compute="w8a8"),
        r"x must be fp16, bf16 or fp32 with compute='w8a8'; got torch.float64; convert it: x.float\(\)",
    ),
    "threshold of a string": (dict(outlier_threshold="6"), r"outlier_threshold must be a number; got str"),
}


@pytest.mark.parametrize("change, message", BAD_VALUES.values(), ids=BAD_VALUES)
def test_values_and_shapes(change, message):
    with pytest.raises(ValueError, match="^int8_linear: " + message):
        int8_linear(**(CALL | change))


@pytest.mark.parametrize("change, message", BAD_KINDS.values(), ids=BAD_KINDS)
def test_dtypes_and_kinds(change, message):
    with pytest.raises(TypeError, match="^int8_linear: " + message):
        int8_linear(**(CALL | change))


def test_trained_bias_is_fine_where_nothing_is_trained():
    with torch.no_grad():
        int8_linear(**(CALL | {"bias": BIAS.clone().requires_grad_()}))


def test_named_backend_never_falls_back():
    for name in ("triton", "cuda"):
        with pytest.raises(BackendUnavailable, match=f"int8_linear: backend '{name}' cannot run this call"):
            int8_linear(**CALL, backend=name)
    with pytest.raises(BackendUnavailable, match="cpu: computes in float32, bfloat16 and float16; got float64"):
        int8_linear(X.double(), WEIGHT, backend="cpu")


def test_second_derivative_is_refused(engine):
    x = X.clone().requires_grad_()
    y = int8_linear(x, WEIGHT, activation="gelu_new", backend=engine)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^int8_linear: its gradient cannot be differentiated again; .*reference"):
        gradient.sum().backward()


@pytest.mark.parametrize("requires_grad", [False, True])
def test_vmap_is_refused(requires_grad):
    x = torch.randn(3, 2, 5, requires_grad=requires_grad)
    with pytest.raises(RuntimeError, match=r"^int8_linear: torch.vmap is not supported; x has batch dimensions of its"):
        torch.vmap(lambda row: int8_linear(row, WEIGHT))(x)


@pytest.mark.parametrize("leaf", [False, True])
@pytest.mark.parametrize("name", ["x", "residual"])
def test_forward_mode_is_refused(engine, name, leaf):
    x = CALL[name].clone().requires_grad_(leaf)
    with (
        forward_ad.dual_level(),
        pytest.raises(RuntimeError, match=r"^int8_linear: forward-mode differentiation is not supported; .*reference"),
    ):
        int8_linear(**(CALL | {name: forward_ad.make_dual(x, torch.ones_like(x))}), backend=engine)


def test_functional_transforms_are_refused():
    with pytest.raises(RuntimeError, match=r"^int8_linear: torch.func transforms are not supported; use torch.autogra"):
        torch.func.grad(lambda x: int8_linear(x, WEIGHT).sum())(X)
