"""Every broken contract is one clear error: op, argument, contract, found, remedy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

from limber_fast import info_nce

N, D = 6, 5
IMAGE, TEXT = torch.randn(N, D), torch.randn(N, D)
WIDE = torch.randn(N + 2, D)

BAD_VALUES = {
    "three dimensions": (
        dict(image=IMAGE[None]),
        r"image must be \[N, D\]; got shape \(1, 6, 5\); reshape it: image.reshape",
    ),
    "no rows": (dict(image=IMAGE[:0], text=TEXT[:0]), r"image must .* at least one row .* \(0, 5\); skip empty"),
    "no features": (dict(image=IMAGE[:, :0], text=TEXT[:, :0]), r"image must .* one feature; got shape \(6, 0\)"),
    "other D": (dict(text=TEXT[:, :3]), r"text must have the D = 5 of image; got shape \(6, 3\); project both"),
    "other device": (dict(text=TEXT.to("meta")), r"text must be on the device of image, cpu; got meta"),
    "extra of other D": (dict(extra_negatives=TEXT[:, :3]), r"extra_negatives must have the D = 5"),
    "no extra": (dict(extra_negatives=TEXT[:0]), r"extra_negatives must be \[K, D\] with at least one row"),
    "N != M": (dict(text=WIDE), r"labels must be given where N and M differ; .*N = 6.*M = 8; pass labels"),
    "symmetric rectangle": (dict(text=WIDE, labels=torch.arange(N)), r"symmetric must be False .* symmetric=False"),
    "labels of other length": (
        dict(labels=torch.arange(N - 1)),
        r"labels must be \[N\] with N = 6; got shape \(5,\); one value per row",
    ),
    "labels too large": (
        dict(labels=torch.arange(N) + 1),
        r"labels must lie in \[0, M\) with M = 6; got .* 1 to 6; they index rows",
    ),
    "labels negative": (dict(labels=torch.arange(N) - 1), r"labels must lie in \[0, M\).* got values from -1 to 4"),
    "labels beyond int32": (dict(labels=torch.arange(N) + 2**32), r"labels must lie in \[0, M\)"),
    "labels repeated": (dict(labels=torch.zeros(N, dtype=torch.int64)), r"labels must be a permutation .*symmetric=F"),
    "ids of other length": (dict(ids=torch.arange(N - 1)), r"image_ids must be \[N\] with N = 6"),
    "one ids for N != M": (
        dict(text=WIDE, labels=torch.arange(N), symmetric=False, ids=torch.arange(N)),
        r"ids must be a pair where N and M differ; got one tensor .* pass a pair",
    ),
    "weights of other length": (dict(weights=torch.ones(N, 1)), r"weights must be \[N\] with N = 6; got .*\(6, 1\)"),
    "weights with grad": (dict(weights=torch.ones(N, requires_grad=True)), r"weights must be constants; .*detach"),
    "smoothing of one": (dict(label_smoothing=1.0), r"label_smoothing must lie in \[0, 1\); got 1.0"),
    "smoothing below zero": (dict(label_smoothing=-0.1), r"label_smoothing must lie in"),
    "smoothing NaN": (dict(label_smoothing=float("nan")), r"label_smoothing must lie in"),
    "smoothed sigmoid": (dict(label_smoothing=0.1, variant="sigmoid"), r"label_smoothing must be 0 with variant='sig"),
    "unknown variant": (dict(variant="hinge"), r"variant must be one of 'softmax', 'sigmoid'; got 'hinge'"),
    "unknown reduction": (dict(reduction="max"), r"reduction must be one of 'mean', 'sum', 'none'; got 'max'"),
    "negative cache": (dict(cache_mb=-1), r"cache_mb must not be negative; got -1; 0 turns it off"),
    "scale beyond fp32": (dict(logit_scale=1e39), r"logit_scale must lie within torch.float32; got 1e\+39;"),
    "bias beyond floats": (dict(logit_bias=10**400), r"logit_bias must lie within torch.float32; got 1000"),
    "two scales": (dict(logit_scale=torch.ones(2)), r"logit_scale must be a number or a tensor .*one value serves all"),
    "unknown backend": (
        dict(backend="tpu"),
        r"^info_nce: backend must be one of 'auto', 'cuda', .* 'eager'; got 'tpu'",
    ),
    "cache of NaN": (dict(cache_mb=float("nan")), r"cache_mb must not be negative; got nan"),
    "meta": (dict(image=IMAGE.to("meta"), text=TEXT.to("meta")), r"image must hold data; got a tensor on meta; mater"),
}

BAD_KINDS = {
    "not a tensor": (dict(image=[[1.0]]), r"image must be a tensor \[N, D\]; got list; convert it"),
    "array": (dict(image=IMAGE.numpy()), r"image must be a tensor \[N, D\]; got ndarray; convert it: torch.as_tensor"),
    "sparse tower": (dict(text=TEXT.to_sparse()), r"text must be a dense tensor \[M, D\]; got torch.sparse_coo; conv"),
    "nested tower": (dict(image=torch.nested.nested_tensor([IMAGE, TEXT])), r"image must be a dense .* got a nested"),
    "float8 tower": (dict(image=IMAGE.to(torch.float8_e4m3fn)), r"image must be fp16, .* got torch.float8_e4m3fn; .*"),
    "integer tower": (
        dict(image=IMAGE.long()),
        r"image must be fp16, bf16, fp32 or fp64; got torch.int64; .*image.float\(\)",
    ),
    "other dtype": (dict(text=TEXT.half()), r"text must have the dtype of image, torch.float32; got torch.float16"),
    "float labels": (dict(labels=torch.zeros(N)), r"labels must be an integer tensor; got torch.float32"),
    "boolean ids": (dict(ids=torch.zeros(N, dtype=torch.bool)), r"image_ids must be an integer tensor; got torch.bool"),
    "three ids": (dict(ids=(1, 2, 3)), r"ids must be a tensor \[N\] or a pair .*got 3 of them"),
    "ids of a string": (dict(ids="ab"), r"ids must be a tensor \[N\] or a pair .*got str"),
    "integer weights": (dict(weights=torch.ones(N, dtype=torch.int64)), r"weights must be floating point"),
    "scale of a string": (dict(logit_scale="1"), r"logit_scale must be a number"),
    "integer scale tensor": (dict(logit_scale=torch.tensor(1)), r"logit_scale must be floating point; got .*; convert"),
    "array of scales": (dict(logit_scale=np.ones(1)), r"logit_scale must be a number .* got ndarray; convert it"),
    "complex scale": (dict(logit_scale=1j), r"logit_scale must be a number .* got complex"),
    "bias of a list": (dict(logit_bias=[1.0]), r"logit_bias must be a number .* got list"),
    "smoothing of a string": (dict(label_smoothing="a"), r"label_smoothing must be a number; got str; convert it: flo"),
    "no smoothing": (dict(label_smoothing=None), r"label_smoothing must be a number; got NoneType"),
    "cache of a string": (dict(cache_mb="a"), r"cache_mb must be a number; got str"),
    "no cache": (dict(cache_mb=None), r"cache_mb must be a number; got NoneType"),
    "normalize of a string": (dict(normalize="no"), r"normalize must be True or False; got 'no'; pass a bool"),
    "symmetric None": (dict(symmetric=None), r"symmetric must be True or False; got None"),
    "stats of a number": (dict(return_stats=1), r"return_stats must be True or False; got 1"),
}


@pytest.mark.parametrize("change, message", BAD_VALUES.values(), ids=BAD_VALUES)
def test_values_and_shapes(change, message):
    with pytest.raises(ValueError, match=message):
        info_nce(**{"image": IMAGE, "text": TEXT, "logit_scale": 1.0, **change})


@pytest.mark.parametrize("change, message", BAD_KINDS.values(), ids=BAD_KINDS)
def test_dtypes_and_kinds(change, message):
    with pytest.raises(TypeError, match=message):
        info_nce(**{"image": IMAGE, "text": TEXT, "logit_scale": 1.0, **change})


def test_messages_start_with_the_op():
    with pytest.raises(ValueError, match=r"^info_nce: "):
        info_nce(IMAGE[0], TEXT, 1.0)


def test_second_derivative_is_refused(engine):
    image = IMAGE.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(info_nce(image, TEXT, 1.0, backend=engine), image, create_graph=True)
    with pytest.raises(RuntimeError, match=r"info_nce: its gradient cannot be differentiated again; .*reference"):
        gradient.sum().backward()


def test_second_derivative_of_the_scale_is_refused():
    scale = torch.tensor(2.0, requires_grad=True)
    (gradient,) = torch.autograd.grad(info_nce(IMAGE, TEXT, scale), scale, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        gradient.backward()


@pytest.mark.parametrize("requires_grad", [False, True])
def test_vmap_is_refused(requires_grad):
    text = TEXT.clone().requires_grad_(requires_grad)
    with pytest.raises(RuntimeError, match=r"info_nce: torch.vmap is not supported"):
        torch.vmap(lambda image: info_nce(image, text, 1.0))(torch.stack([IMAGE, IMAGE]))


def _dual(x):
    return forward_ad.make_dual(x, torch.ones_like(x))


@pytest.mark.parametrize("leaf", [False, True])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_forward_mode_is_refused(engine, position, leaf):
    arguments = [IMAGE, TEXT, torch.tensor(1.0)]
    arguments[position] = arguments[position].clone().requires_grad_(leaf)
    message = r"^info_nce: forward-mode differentiation is not supported; the dense formula, .*reference"
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=message):
        info_nce(*(_dual(x) if i == position else x for i, x in enumerate(arguments)), backend=engine)
    with pytest.raises(RuntimeError, match=message):
        torch.func.jvp(lambda x: info_nce(x, TEXT, 1.0), (IMAGE,), (IMAGE,))
    with forward_ad.dual_level():  # a level alone is no derivative
        assert info_nce(*(x.detach() for x in arguments)) == info_nce(IMAGE, TEXT, 1.0)


def test_forward_over_reverse_is_refused():
    image = IMAGE.clone().requires_grad_()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode differentiation is not supported"):
        torch.autograd.grad(info_nce(image, TEXT, 1.0), image, _dual(torch.tensor(1.0)))


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.hessian])
def test_functional_transforms_are_refused(transform):
    with pytest.raises(RuntimeError, match=r"^info_nce: torch.func transforms are not .*; use torch.autograd.grad; "):
        transform(lambda x: info_nce(x, TEXT, 1.0))(IMAGE)
