"""frozen_cross_entropy at GPT-J's head, forward and backward, against bf16 logits and their cross entropy.

'eager' computes the logits of all rows, as language models do; 'labelled' those of the labelled rows alone, as a
careful engineer writes it, 'compile' what torch.compile makes of these, and 'liger' theirs too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import cases
import pytest
import torch
from comparison import Trial, Workload, add_peer, available_bytes, compiled
from torch import Tensor

from limber_fast import frozen_cross_entropy, quantize_int8
from limber_fast.reference.frozen_cross_entropy import frozen_cross_entropy as reference

D = 4096
# Of a bf16 gradient, and of one whose logits and their gradient are bf16 too.
TOLERANCE, BASELINE_TOLERANCE = 1e-2, 4e-2
SAMPLED = 8


def _liger() -> Callable[..., Tensor]:
    """Cross entropy of [rows, D], the weight, bias and labels, chunk by chunk."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight, bias, labels: loss(weight, hidden, labels, bias)


@lru_cache(maxsize=1)
def head(vocabulary: int, device: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-127, 128, (vocabulary, D), generator=generator, dtype=torch.int8).to(device)
    weight = quantize_int8(q.bfloat16())
    weight.scales.fill_(2 / (73 * D**0.5))
    bias = torch.randn(vocabulary, generator=generator).to(device)
    return {"weight": weight, "bf16": q.bfloat16() * weight.scales[0], "bias": bias}


def prepare(workload: Workload) -> Trial:
    m, labelled, v = (workload.shape[name] for name in ("M", "labelled", "V"))
    backward = not workload.options.get("forward")
    made, generator = head(v, workload.device), torch.Generator().manual_seed(1)
    hidden = torch.randn(m, D, generator=generator).bfloat16().to(workload.device).requires_grad_(backward)
    labels = torch.full((m,), -100)
    rows = torch.randperm(m, generator=generator)[:labelled].sort().values
    labels[rows] = torch.randint(0, v, (labelled,), generator=generator)
    labels, rows = labels.to(workload.device), rows.to(workload.device)
    bias = made["bias"].bfloat16()

    def step(function: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, Tensor | None]]:
        def run() -> tuple[Tensor, Tensor | None]:
            loss = function()
            return loss.detach(), torch.autograd.grad(loss, hidden)[0] if backward else None

        return run

    def labelled_rows(loss: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, Tensor | None]]:
        return step(lambda: loss(hidden[rows], made["bf16"], bias, labels[rows]))

    baselines, skipped = {"labelled": labelled_rows(cases.eager_cross_entropy)}, {}
    if workload.group == "cuda":
        baselines["compile"] = labelled_rows(compiled(cases.eager_cross_entropy))
        add_peer("liger", lambda: labelled_rows(_liger()), baselines, skipped)
    needed, free = 12 * m * v, available_bytes(workload.device)  # bf16 and fp32 logits, fp32 log-softmax
    if free is not None and needed > free:
        skipped["eager"] = f"needs {needed >> 20} MiB of logits, {free >> 20} are free"
    else:
        baselines["eager"] = step(lambda: cases.eager_cross_entropy(hidden, made["bf16"], bias, labels))

    some = rows[:: -(-labelled // SAMPLED)]
    wide = hidden[some].detach().double().requires_grad_()
    losses = reference(wide, made["weight"].integers(), made["weight"].scales, bias, labels[some], reduction="sum")
    true = torch.autograd.grad(losses / labelled, wide)[0]
    with torch.no_grad():
        expected = cases.eager_cross_entropy(
            hidden[rows].float(), made["weight"].dequantize(), bias.float(), labels[rows]
        )

    # On the CPU 16-bit activations are two digits of 8 bits; on a GPU the integers become bf16.
    digits, arithmetic = (2, "int8") if workload.device == "cpu" else (1, "bfloat16")

    def errors(result: tuple[Tensor, Tensor | None]) -> dict[str, float]:
        found = {"loss": max(cases.errors(result[0][None], expected[None].double()))}
        if result[1] is not None:
            found["hidden"] = max(cases.errors(result[1][some], true))
            found["without label"] = float(result[1].masked_fill((labels >= 0)[:, None], 0).abs().max())
        return found

    return Trial(
        ours=step(lambda: frozen_cross_entropy(hidden, made["weight"], bias, labels)), baselines=baselines,
        errors=errors, tolerance=TOLERANCE, baseline_tolerance=BASELINE_TOLERANCE,
        flops=2.0 * digits * labelled * v * D * (2 if backward else 1), bytes=v * D + 2 * labelled * D, skipped=skipped,
        arithmetic=arithmetic,
    )  # fmt: skip


def workload(group: str, m: int, labelled: int, v: int = 50400, *, quick: bool = False, **fields):
    row = Workload("frozen_cross_entropy", group, {"M": m, "labelled": labelled, "V": v}, "bfloat16",
                   cost=4 * (m + labelled) * v * D, prepare=prepare, **fields)  # fmt: skip
    return pytest.param(row, id=f"{group}-{row.name}", marks=[pytest.mark.quick] if quick else [])


WORKLOADS = [
    *(workload("labelled", 2048, labelled) for labelled in (16, 64, 256)),
    workload("labelled", 256, 256),
    workload("vocabulary", 256, 64, 8192, quick=True),
    workload("labelled", 1280, 1280),
    workload("forward", 2048, 256, options={"forward": 1}),
    *(workload("isa", 256, 64, isa=isa) for isa in ("avx512", "avx2")),
    workload("cuda", 2048, 256, device="cuda"),
]  # fmt: skip


@pytest.mark.parametrize("workload", WORKLOADS)
def test_frozen_cross_entropy(compare, workload):
    compare(workload)
