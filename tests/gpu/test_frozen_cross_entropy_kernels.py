"""The Triton kernels of frozen_cross_entropy behind the public op: interpreted, as executed PTX and on a GPU.

Held against float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import cases
import pytest
import torch
from torch import Tensor

from gpu.launching import ENGINES, on, on_engines, running, send_to_triton
from gpu.test_int8_linear_kernels import on_gpu
from limber_fast import Int8Weight, frozen_cross_entropy, quantize_int8
from limber_fast.kernels import frozen_cross_entropy_launch as launch
from limber_fast.reference.frozen_cross_entropy import frozen_cross_entropy as reference


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, poisoned: None) -> str:
    """CPU tensors go to the Triton backend, whose launches run on the engine; its outputs are NaN beforehand."""
    send_to_triton(monkeypatch, "frozen_cross_entropy", request.param)
    return request.param


@dataclass(frozen=True)
class Call:
    """Rows, vocabulary and features of a head.

    `weight_by` multiplies its scales, `broken` hidden holds NaN and Inf. `tokens`: one of each row, another one in
    every row, whose logit "peaks" above all others, "overflows" fp32, and the row's loss is NaN, or is the label's and
    leaves a loss near 0, "sure".
    """

    shape: tuple[int, int, int]
    dtype: torch.dtype = torch.bfloat16
    bias: bool = True
    weight_by: float = 1.0
    broken: bool = False
    tokens: str = ""

    def values(self) -> dict[str, Tensor]:
        found = {name: x.clone() for name, x in cases.head(*self.shape, self.dtype).items()}
        rows = len(found["labels"])
        if not self.tokens:
            return found
        # Every value of a lane has its turn in both chunks, of 512 and 488 tokens, whether lanes own 8 at a time or 4.
        row = torch.arange(rows - 1)
        tokens = (row & 3) + 132 * (row >> 2 & 1) + 256 * (row >> 3 & 1) + 8 * (5 * row % 12) + 512 * (row >> 4)
        found["labels"] = torch.cat([tokens if self.tokens == "sure" else tokens.roll(1), torch.tensor([-100])])
        if self.tokens == "overflows":
            found["labels"][:-1:2] = tokens[::2]
            found["weight"][:, :rows], largest = 0, found["weight"].abs().max()
            found["weight"][tokens, row] = largest  # a feature of its own per row, read by its token's channel alone
            found["hidden"][:, :rows] = torch.eye(rows) * 3e38
            found["grad"][-1] = torch.inf
        else:
            found["weight"][tokens] = found["hidden"][:-1] * (3 if self.tokens == "peaks" else 24 / self.shape[2])
        return found

    def weight(self) -> Int8Weight:
        made = quantize_int8(self.values()["weight"])
        made.scales *= self.weight_by
        return made

    def run(self, function, dtype: torch.dtype | None = None) -> list[Tensor]:
        """The losses and the gradient of hidden."""
        values, dtype = self.values(), dtype or self.dtype
        hidden = values["hidden"].to(dtype, copy=True)
        if self.broken:
            hidden[0, 0], hidden[-1, -1] = torch.nan, torch.inf
        hidden.requires_grad_()
        losses = function(hidden, values["bias"].to(dtype) if self.bias else None, values["labels"])
        grad = values["grad"].to(losses.dtype)
        if self.broken:
            grad[1] = torch.inf  # of a row without a label
        return [losses.detach(), *torch.autograd.grad(losses, hidden, grad)]

    def ours(self, engine: str) -> list[Tensor]:
        weight = on_gpu(self.weight(), engine)
        with running(engine):
            return self.run(
                on(engine, lambda hidden, bias, labels: frozen_cross_entropy(
                    hidden, weight, bias, labels, reduction="none"))
            )  # fmt: skip

    def eager(self) -> list[Tensor]:
        weight = self.weight().dequantize(self.dtype)
        return self.run(lambda *operands: cases.eager_cross_entropy(operands[0], weight, *operands[1:], "none"))

    def exact(self, hidden: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        weight = self.weight()
        losses = reference(hidden, weight.integers(), weight.scales, bias, labels, reduction="none")
        return losses * torch.where(labels >= 0, torch.nan, 1.0) if self.tokens == "overflows" else losses

    def true(self) -> list[Tensor]:
        return self.run(self.exact, torch.float64)


CALLS = {
    "plain": Call((40, 333, 70)),
    "chunks": Call((5, 1300, 31)),
    "fp16": Call((7, 700, 40), torch.float16),
    "fp32": Call((20, 130, 75), torch.float32),
    "one": Call((1, 1, 1), torch.float32),
    "no_bias": Call((3, 600, 33), bias=False),
    "sure": Call((9, 140, 70), torch.float32, weight_by=8.0),  # losses from nearly 0 to a hundred
    "sure_fp16": Call((9, 140, 70), torch.float16, weight_by=4.0),
    "peaks": Call((33, 1000, 40), tokens="peaks"),
    "peaks_fp32": Call((33, 1000, 40), torch.float32, tokens="peaks"),
    "surer": Call((33, 1000, 40), torch.float32, tokens="sure"),
}


@on_engines("name", CALLS, kept=("plain", "sure"))
def test_against_float64(engine, monkeypatch, name):
    monkeypatch.setattr(launch, "HELD", 1)  # the smallest chunks
    call = CALLS[name]
    for place, (x, y, z) in enumerate(zip(call.ours(engine), call.true(), call.eager(), strict=True)):
        assert x.shape == y.shape and x.dtype == (torch.float32 if place == 0 else call.dtype)
        for error, of_eager in zip(cases.errors(x, y), cases.errors(z, y), strict=True):
            assert error <= 2 * of_eager + cases.FLOOR[call.dtype], (place, error, of_eager)


@on_engines("dtype", (torch.bfloat16, torch.float32), kept=())
def test_a_logit_that_overflows(engine, monkeypatch, dtype):
    monkeypatch.setattr(launch, "HELD", 1)
    call = Call((33, 1000, 40), dtype, tokens="overflows")
    for x, y in zip(call.ours(engine), call.true(), strict=True):
        assert torch.equal(x.isnan(), y.isnan()) and not x[~y.isnan()].any()


def test_nan_and_infinity_spoil_their_rows_alone(engine):
    call = Call((8, 70, 40), torch.float32, broken=True)
    losses, gradient = call.ours(engine)
    spoiled = torch.zeros(8, dtype=torch.bool)
    spoiled[0] = True  # row 7 has no label
    assert torch.equal(losses.isnan(), spoiled) and torch.equal(gradient.isnan().all(1), spoiled)
    assert torch.equal(gradient.isnan().any(1), spoiled) and not gradient[[1, 4, 7]].any() and not losses[7]


def test_logits_of_minus_infinity(engine):
    """A bias that forbids tokens: a chunk of them, then one label."""
    weight = on_gpu(quantize_int8(torch.ones(1030, 8)), engine)
    bias = torch.zeros(1030)
    bias[:513] = -torch.inf
    labels = torch.tensor([600, 5, 1029])
    with running(engine), pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "HELD", 1)
        found = on(engine, lambda x: frozen_cross_entropy(x, weight, bias.to(x.device), labels.to(x.device),
                                                          reduction="none"))(torch.ones(3, 8))  # fmt: skip
    torch.testing.assert_close(found, torch.tensor([517.0, torch.inf, 517.0]).log())


def test_no_label_at_all(engine):
    weight = on_gpu(quantize_int8(torch.ones(5, 8)), engine)
    hidden, labels = torch.ones(3, 8, requires_grad=True), torch.full((3,), -100)
    with running(engine):
        losses = on(engine, lambda x, y: frozen_cross_entropy(x, weight, None, y, reduction="none"))(hidden, labels)
        (gradient,) = torch.autograd.grad(losses.sum(), hidden)
    assert not losses.any() and not gradient.any()


def test_chunks_hold_what_was_promised():
    for rows in (1, 2, 300, 8192, 100_000):
        chunk = launch.chunk_of(rows, 50400)
        assert rows * (chunk - 512) <= launch.HELD and chunk in (50400, *range(512, 50400, 512))
