"""The Triton kernels of int8_linear behind the public op: interpreted, as executed PTX and on a GPU.

Held against float64.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import cases
import pytest
import torch
from torch import Tensor

from gpu.launching import ENGINES, on, on_engines, running, send_to_triton
from limber_fast import Int8Weight, int8_linear, quantize_int8
from limber_fast.ops.int8_weight import to_rows
from limber_fast.reference.int8_linear import int8_linear as reference


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, poisoned: None) -> str:
    """CPU tensors go to the Triton backend, whose launches run on the engine; its outputs are NaN beforehand."""
    send_to_triton(monkeypatch, "int8_linear", request.param)
    return request.param


@cache
def weight_of(n: int, k: int, dtype: torch.dtype) -> Int8Weight:
    return quantize_int8(cases.int8_layer(1, n, k, dtype)["weight"])


def on_gpu(weight: Int8Weight, engine: str) -> Int8Weight:
    """The weight as it lies on a GPU: there, or in that layout on the CPU."""
    n, k = weight.shape
    if engine == "cuda":
        moved = Int8Weight(n, k, device="cuda")
        moved.load_state_dict(weight.state_dict())
        return moved
    moved = Int8Weight(n, k)
    for name, x in weight.named_buffers():
        setattr(moved, name, to_rows(x, n) if name == "packed" else x)
    return moved


@dataclass(frozen=True)
class Call:
    """int8_linear of M tokens, K features and N channels, with everything in its epilogue unless said otherwise.

    `spread`: the largest and the smallest feature, one at the threshold, one beyond it, and a gradient that dwarfs all
    others have another place in every row, and gelu_new comes to its ends.
    """

    m: int
    n: int = 75
    k: int = 130
    dtype: torch.dtype = torch.bfloat16
    bias: bool = True
    activation: str | None = "gelu_new"
    residual: bool = True
    options: dict = field(default_factory=dict)
    grad_by: float = 1.0  # what the gradient is multiplied by
    broken: str = ""  # what holds NaN and infinities
    spread: bool = False

    def values(self) -> dict[str, Tensor]:
        found = {name: x.clone() for name, x in cases.int8_layer(self.m, self.n, self.k, self.dtype).items()}
        if self.broken:
            for place, value in ((1, torch.nan), (-1, torch.inf), (found[self.broken].numel() // 2, -torch.inf)):
                found[self.broken].view(-1)[place] = value
        if self.spread:
            rows = torch.arange(self.m)
            found["x"].clamp_(-1, 1)
            for step, value in ((11, 30.0), (7, 6.0), (5, 5.5), (3, -5.5)):
                found["x"][rows, (step * rows + rows // 4) % self.k] = value
            found["bias"] *= 20
            found["grad"][rows, (5 * rows + rows // 4) % self.n] = 6e4
        return found

    def run(self, function, dtype: torch.dtype | None = None) -> list[Tensor]:
        """The result and the gradient of x and residual, for a fixed gradient of the result."""
        values, dtype = self.values(), dtype or self.dtype
        leaves = [values["x"].to(dtype).requires_grad_()]
        leaves += [values["residual"].to(dtype).requires_grad_()] if self.residual else []
        y = function(leaves[0], values["bias"].to(dtype) if self.bias else None, activation=self.activation,
                     residual=leaves[1] if self.residual else None, **self.options)  # fmt: skip
        return [y.detach(), *torch.autograd.grad(y, leaves, self.grad_by * values["grad"].to(dtype))]

    def ours(self, engine: str) -> list[Tensor]:
        weight = on_gpu(weight_of(self.n, self.k, self.dtype), engine)
        with running(engine):
            return self.run(on(engine, lambda x, bias, **options: int8_linear(x, weight, bias, **options)))

    def eager(self) -> list[Tensor]:
        """With its weight in the dtype of x."""
        dense = weight_of(self.n, self.k, self.dtype).dequantize(self.dtype)

        def function(x, bias, activation, residual, **_):
            return cases.eager_int8_linear(x, dense, bias, activation, residual)

        return self.run(function)

    def true(self) -> list[Tensor]:
        weight = weight_of(self.n, self.k, self.dtype)
        q, scales = weight.integers(), weight.scales
        return self.run(lambda x, bias, **options: reference(x, q, scales, bias, **options), torch.float64)


W8A8 = {"compute": "w8a8"}
CALLS = {
    "decode": Call(1),
    "few": Call(13, 97, 330),
    "some": Call(33, 75, 257),
    "many": Call(70, 140, 200),
    "bare": Call(5, bias=False, activation=None, residual=False),
    "fp32": Call(20, dtype=torch.float32),
    "fp32_decode": Call(2, dtype=torch.float32, residual=False),
    "fp16": Call(20, dtype=torch.float16),
    "least": Call(1, 1, 1),
    "w8a8": Call(33, 75, 257, options=W8A8),
    "w8a8_decode": Call(2, options=W8A8),
    "w8a8_fp32": Call(70, 75, 330, dtype=torch.float32, activation=None, options=W8A8),
    "w8a8_fp16": Call(3, dtype=torch.float16, bias=False, options=W8A8),
    "spread": Call(70, 250, 330, spread=True),
    "fp32_small_gradient": Call(20, dtype=torch.float32, activation=None, grad_by=1e-34),
    "w8a8_spread": Call(14, 120, 500, spread=True, options=W8A8),
    "all_rounded": Call(9, dtype=torch.float32, options={**W8A8, "outlier_threshold": 0.0}),
    "all_outliers": Call(3, 40, 70, dtype=torch.float32, options={**W8A8, "outlier_threshold": 1e-9}),
}


def _within(found: list[Tensor], true: list[Tensor], eager: list[Tensor], floor: float) -> None:
    for place, (x, y, z) in enumerate(zip(found, true, eager, strict=True)):
        assert x.shape == y.shape
        for error, of_eager in zip(cases.errors(x, y), cases.errors(z, y), strict=True):
            assert error <= 2 * of_eager + floor, (place, error, of_eager)


@on_engines("name", CALLS, kept=("many", "w8a8"))
def test_against_float64(engine, name):
    call = CALLS[name]
    found, true = call.ours(engine), call.true()
    # The integers of w8a8 are the reference's own: nothing is left but the rounding of the result.
    eager = true if call.options else call.eager()
    _within(found[:1], true[:1], eager[:1], cases.FLOOR[call.dtype])
    _within(found[1:], true[1:], call.eager()[1:], cases.FLOOR[call.dtype])


SPLIT = {
    "decode": Call(2, 70, 2500),
    "many": Call(70, 70, 2100),
    "w8a8_decode": Call(2, 70, 2500, options=W8A8),
    "w8a8": Call(70, 70, 2100, options=W8A8),
}


@on_engines("name", SPLIT, kept=("decode",))
def test_split_reductions(monkeypatch, engine, name):
    """More programs than tiles: several add up one tile, the backward pass's too."""
    send_to_triton(monkeypatch, "int8_linear", engine, programs=12)
    call = SPLIT[name]
    found, true = call.ours(engine), call.true()
    _within(found, true, call.eager(), cases.FLOOR[call.dtype])


BROKEN = {
    f"{compute}-{broken}": (options, broken)
    for compute, options in (("w8a16", {}), ("w8a8", W8A8))
    for broken in ("x", "bias", "residual", "grad")
}


@on_engines("name", BROKEN, kept=("w8a8-x",))
def test_nan_and_infinity_reach_what_they_reach_in_eager(engine, name):
    options, broken = BROKEN[name]
    call = Call(5, dtype=torch.float32, activation=None, options=options, broken=broken)
    for place, (x, y) in enumerate(zip(call.ours(engine), call.eager(), strict=True)):
        assert torch.equal(x.isnan(), y.isnan()) and torch.equal(x.isinf(), y.isinf()), place
