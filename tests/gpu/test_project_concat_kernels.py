"""The Triton kernels of project_concat behind the public op: interpreted, as executed PTX and on a GPU.

Held against float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import cases
import pytest
import torch
from torch import Tensor

from gpu.launching import ENGINES, on, running, send_to_triton
from limber_fast import project_concat
from limber_fast.reference.project_concat import project_concat as reference

IMAGE = 1000  # outside the vocabulary


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, poisoned: None) -> str:
    """CPU tensors go to the Triton backend, whose launches run on the engine; its outputs are NaN beforehand."""
    send_to_triton(monkeypatch, "project_concat", request.param)
    return request.param


@dataclass(frozen=True)
class Call:
    """n_images images of k tokens, D -> E, spread over two rows of text."""

    n_images: int = 3
    k: int = 5
    d: int = 72
    e: int = 40
    dtype: torch.dtype = torch.bfloat16
    dropout_p: float = 0.0
    norm: bool = False
    int8: bool = False
    bias: bool = True
    broken: bool = False  # NaN and infinity in features, weight and the upstream gradient

    def data(self) -> tuple[list[Tensor], Tensor, Tensor | tuple[Tensor, Tensor], dict]:
        """Differentiable inputs in float64 values of `dtype`, ids, embedding, options."""
        generator = torch.Generator().manual_seed(3)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)

        leaves = [random(self.n_images, self.k, self.d), random(self.e, self.d) / self.d**0.5]
        leaves += [random(self.e)] if self.bias else []
        leaves += [random(self.e).float(), random(self.e).float()] if self.norm else []
        first = self.n_images // 2 + 1
        image = [IMAGE] * self.k
        rows = [[7, *(image * first), 3], [*(image * (self.n_images - first)), 11]]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [1] * (longest - len(row)) for row in rows])
        embedding = random(20, self.e)
        if self.int8:
            embedding = (torch.randint(-127, 128, (20, self.e), generator=generator, dtype=torch.int8),
                         torch.rand(20, generator=generator) / 64)  # fmt: skip
        return leaves, ids, embedding, {"image_token_id": IMAGE, "dropout_p": self.dropout_p, "seed": 5}

    def run(self, function, dtype: torch.dtype | None = None) -> list[Tensor]:
        """The result and the gradient of every leaf, for a fixed gradient of the result."""
        leaves, ids, embedding, options = self.data()
        if self.broken:
            leaves[0][-1, 0, 3], leaves[0][0, -1, 5], leaves[1][2, 1] = torch.nan, torch.inf, -torch.inf
        leaves = [x.to(dtype or x.dtype).requires_grad_() for x in leaves]
        features, weight, *rest = leaves
        bias = rest.pop(0) if self.bias else None
        norm = (*rest, 1e-5) if self.norm else None
        out = function(features, weight, bias, ids, embedding, layer_norm=norm, **options)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(self.dtype).to(out.dtype)
        if self.broken:
            upstream[0, 2, 1], upstream[1, 1, 0] = torch.nan, torch.inf
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


CALLS = {
    "plain": Call(),
    "ragged": Call(n_images=7, k=19, d=123, e=75),
    "fp32": Call(dtype=torch.float32),
    "fp16": Call(dtype=torch.float16),
    "one": Call(n_images=1, k=1, d=7, e=3),
    "no_bias": Call(bias=False),
    "int8": Call(int8=True),
    "dropout": Call(dropout_p=0.3),
    "heavy_dropout": Call(dropout_p=0.9),
    "norm": Call(norm=True),
    "norm_dropout": Call(norm=True, dropout_p=0.3, dtype=torch.float32),
}


def _eager(*args, **kwargs) -> Tensor:
    return project_concat(*args, backend="eager", **kwargs)


@pytest.mark.parametrize("name", CALLS)
def test_against_float64(engine, name):
    call = CALLS[name]
    with running(engine):
        found = call.run(on(engine, project_concat))
    true, eager = call.run(reference, torch.float64), call.run(_eager)
    for place, (x, y, z) in enumerate(zip(found, true, eager, strict=True)):
        for error, of_eager in zip(cases.errors(x, y), cases.errors(z, y), strict=True):
            assert error <= 2 * of_eager + cases.FLOOR[call.dtype], (place, error, of_eager)


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.5}, {"norm": True}], ids=str)
def test_nan_and_infinity_reach_what_they_reach_in_eager(engine, options):
    call = Call(broken=True, **options)
    with running(engine):
        found = call.run(on(engine, project_concat))
    for place, (x, y) in enumerate(zip(found, call.run(_eager), strict=True)):
        assert torch.equal(x.isnan(), y.isnan()) and torch.equal(x.isinf(), y.isinf()), place


@pytest.mark.parametrize("n_images", [0, 5])
def test_expanded_features_and_gradient(engine, n_images):
    """One image in every place, or none; a gradient that is one row. Strides of 0, and no soft prompt at all."""
    leaves, _, embedding, options = Call(k=1, n_images=1).data()
    ids = torch.tensor([[7, *[IMAGE] * n_images, 3]])
    grad = leaves[2].flip(0).expand(1, ids.shape[1], 40)

    def run(function):
        features, weight, bias = (x.detach().requires_grad_() for x in leaves)
        out = function(features.expand(n_images, 1, 72), weight, bias, ids, embedding, **options)
        return out, *torch.autograd.grad(out, (features, weight, bias), grad)

    with running(engine):
        found = run(on(engine, project_concat))
    for x, y in zip(found, run(_eager), strict=True):
        torch.testing.assert_close(x, y, rtol=2**-6, atol=2**-6)


def test_frozen_inputs_and_strided_features(engine):
    leaves, ids, embedding, options = CALLS["dropout"].data()
    features = torch.cat([leaves[0][:, :1], leaves[0]], 1)[:, 1:]  # a class token sliced off
    with running(engine):
        weight = leaves[1].requires_grad_()
        out = on(engine, project_concat)(features, weight, leaves[2], ids, embedding, **options)
        (alone,) = torch.autograd.grad(out.float().sum(), weight)
        whole = [x.detach().requires_grad_() for x in leaves[:3]]
        both = torch.autograd.grad(on(engine, project_concat)(*whole, ids, embedding, **options).float().sum(), whole)
    assert torch.equal(alone, both[1])


def test_the_mask_is_eagers(engine):
    leaves, ids, embedding, options = Call(dropout_p=0.5, e=70, k=9, dtype=torch.float32).data()
    with running(engine):
        found = on(engine, project_concat)(*leaves, ids, embedding, **options)
    assert torch.equal(found == 0, _eager(*leaves, ids, embedding, **options) == 0)
