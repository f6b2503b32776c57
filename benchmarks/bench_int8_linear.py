"""int8_linear at GPT-J's two shapes, prefill and decode, forward and backward, against bf16 and torch's int8 products.

Up to 16 rows memory is the bound: calls go round several copies of the weight, as through the layers of a model, and
no cache holds the next one. On CUDA peers are what torch.compile makes of eager and of the int8 product ('compile',
'compile_int8'), and bitsandbytes, which rounds the activations row by row whatever the row computes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import count
from typing import Any

import cases
import pytest
import torch
import torch.nn.functional as F
from comparison import Trial, Workload, add_peer, compiled
from torch import Tensor

from limber_fast import int8_linear, quantize_int8

SHAPES = {"fc_in": (28672, 4096), "fc_out": (4096, 20480)}  # q|k|v|fc_in and out_proj|fc_out of a block
MEMORY_BOUND, COLD_BYTES = 16, 560 << 20
# Of bf16 results: 'w8a16' rounds the result, 'w8a8' also the activations, by row; a peer may round them by tensor.
TOLERANCE = {"w8a16": 1e-2, "w8a8": 4e-2}
BASELINE_TOLERANCE = 8e-2
SAMPLED = 128
LEAST_INT_MM = 16


@lru_cache(maxsize=1)
def layers(n: int, k: int, copies: int, device: str) -> list[dict[str, Any]]:
    """Weights at the scale of a language model, each as int8 for the peers, packed, and in bf16."""
    generator = torch.Generator().manual_seed(0)
    scale, made = 1 / (73 * k**0.5), []
    for _ in range(copies):
        q = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8).to(device)
        q[:, 0] = 127  # a row's largest: quantised, it keeps its integers also where k is small
        weight = quantize_int8(q.bfloat16())
        weight.scales.fill_(scale)
        made.append({"q": q, "weight": weight, "bf16": q.bfloat16() * scale})
    return made


def _by_int_mm(x: Tensor, q: Tensor, scales: Tensor) -> Tensor:
    """Symmetric rounding row by row, then torch's int8 product."""
    step = x.abs().amax(1, keepdim=True).float() / 127
    y = torch._int_mm((x / step).round().to(torch.int8), q.T)
    return (y * step * scales).to(x.dtype)


def _by_widening(x: Tensor, q: Tensor, scales: Tensor) -> Tensor:
    """The weight in the activations' dtype, for torch.compile to widen inside the product."""
    return (x @ q.to(x.dtype).T * scales).to(x.dtype)


def _bitsandbytes(layers: list[dict[str, Any]], x: Tensor) -> Callable[[int], Tensor]:
    """LLM.int8() as Linear8bitLt calls it, over our own integers; no column counts as an outlier.

    It computes in fp16. Given bf16 it casts the same, and writes a warning at every call.
    """
    import bitsandbytes

    states = []
    for layer in layers:
        states.append(bitsandbytes.MatmulLtState())
        states[-1].has_fp16_weights, states[-1].is_training = False, False
        states[-1].CB, states[-1].SCB = layer["q"], 127 * layer["weight"].scales
    return lambda i: bitsandbytes.matmul(x.half(), layers[i]["q"], state=states[i]).to(x.dtype)


def _onednn(q: Tensor, scales: Tensor, x: Tensor) -> Callable[[Tensor], Tensor]:
    """oneDNN's int8 linear, as quantised models call it: one scale and zero point for all of x."""
    packed = torch.ops.onednn.qlinear_prepack(q, list(x.shape))
    zeros = torch.zeros(len(q), dtype=torch.int32)

    def call(x: Tensor) -> Tensor:
        low, high = x.aminmax()
        step = float(high - low) / 255
        zero = round(-float(low) / step)
        u = (x.float() / step + zero).round_().clamp_(0, 255).to(torch.uint8)
        return torch.ops.onednn.qlinear_pointwise(
            u, step, zero, packed, scales, zeros, None, 1.0, 0, torch.bfloat16, "none", [], ""
        )

    call(x)
    return call


def prepare(workload: Workload) -> Trial:
    n, k, m = (workload.shape[letter] for letter in ("N", "K", "M"))
    compute = "w8a8" if workload.options.get("w8a8") else "w8a16"
    activation = "gelu_new" if workload.options.get("gelu") else None
    backward = bool(workload.options.get("backward"))
    device, on_cpu = workload.device, workload.device == "cpu"
    made = layers(n, k, -(-COLD_BYTES // (n * k)) if m <= MEMORY_BOUND else 1, device)
    scales = made[0]["weight"].scales
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(m, n if backward else k, generator=generator).bfloat16().to(device)  # backward: the gradient of y

    def in_turn(function: Callable[[dict[str, Any], int], Tensor]) -> Callable[[], tuple[int, Tensor]]:
        turn = count()

        def call() -> tuple[int, Tensor]:
            which = next(turn) % len(made)
            return which, function(made[which], which)

        return call

    skipped = {}
    if backward:
        leaf = torch.zeros(m, k, dtype=torch.bfloat16, device=device, requires_grad=True)
        graphs = [int8_linear(leaf, layer["weight"]) for layer in made]
        ours = in_turn(lambda _, i: torch.autograd.grad(graphs[i], leaf, x, retain_graph=True)[0])
        baselines = {"eager": in_turn(lambda layer, _: x @ layer["bf16"])}
    else:
        ours = in_turn(lambda layer, _: int8_linear(x, layer["weight"], activation=activation, compute=compute))

        def activated(y: Tensor) -> Tensor:
            return y if activation is None else F.gelu(y, approximate="tanh")

        baselines = {"eager": in_turn(lambda layer, _: activated(F.linear(x, layer["bf16"])))}
        if compute == "w8a16" and on_cpu:
            half = scales.bfloat16()
            baselines["int8pack"] = in_turn(lambda layer, _: activated(torch._weight_int8pack_mm(x, layer["q"], half)))
        elif on_cpu:
            baselines["int_mm"] = in_turn(lambda layer, _: activated(_by_int_mm(x, layer["q"], scales)))
            try:
                peers = [_onednn(layer["q"], scales, x) for layer in made]
                baselines["onednn"] = in_turn(lambda _, i: activated(peers[i](x)))
            except (AttributeError, RuntimeError, NotImplementedError) as error:
                skipped["onednn"] = str(error).partition("\n")[0]
        if workload.group == "cuda":
            linear = compiled(lambda x, weight: activated(F.linear(x, weight)))
            baselines["compile"] = in_turn(lambda layer, _: linear(x, layer["bf16"]))
            product = _by_widening if compute == "w8a16" else _by_int_mm
            if compute == "w8a8" and m <= LEAST_INT_MM:
                skipped["compile_int8"] = f"torch._int_mm takes more than {LEAST_INT_MM} rows on CUDA"
            else:
                low = compiled(lambda x, q: activated(product(x, q, scales)))
                baselines["compile_int8"] = in_turn(lambda layer, _: low(x, layer["q"]))

            def bitsandbytes() -> Callable[[], tuple[int, Tensor]]:
                matmul = _bitsandbytes(made, x)
                return in_turn(lambda _, i: activated(matmul(i)))

            add_peer("bitsandbytes", bitsandbytes, baselines, skipped)

    rows = torch.linspace(0, m - 1, min(m, 16)).long()
    columns = torch.linspace(0, (k if backward else n) - 1, SAMPLED).long()

    def errors(result: tuple[int, Tensor]) -> dict[str, float]:
        which, y = result
        q = made[which]["q"][:, columns].T if backward else made[which]["q"][columns]
        true = x[rows].double() @ q.double().T * float(scales[0])
        if activation is not None:
            true = F.gelu(true, approximate="tanh")
        return {"y": max(cases.errors(y[rows][:, columns], true))}

    # On the CPU 16-bit activations are two digits of 8 bits; on a GPU the integers become bf16.
    digits = 2 if compute == "w8a16" and on_cpu else 1
    arithmetic = "int8" if compute == "w8a8" or on_cpu else "bfloat16"
    return Trial(
        ours=ours, baselines=baselines, errors=errors, tolerance=TOLERANCE[compute],
        baseline_tolerance=BASELINE_TOLERANCE, flops=2.0 * digits * m * n * k, bytes=n * k + 2 * m * (n + k),
        skipped=skipped, bound="bytes" if m <= MEMORY_BOUND else "flops", arithmetic=arithmetic,
    )  # fmt: skip


def workload(group: str, layer: str, m: int, *, quick: bool = False, **fields):
    n, k = SHAPES[layer]
    row = Workload("int8_linear", group, {"M": m, "N": n, "K": k}, "bfloat16", cost=2 * max(m, 32) * n * k,
                   prepare=prepare, **fields)  # fmt: skip
    return pytest.param(row, id=f"{group}-{row.name}", marks=[pytest.mark.quick] if quick else [])


ROWS = (1, 4, 16, 64, 256)
# The weights are made once for neighbouring rows.
WORKLOADS = [
    *(workload(layer, layer, m, options=options, quick=layer == "fc_out" and m == 64)
      for layer in SHAPES for m in ROWS for options in ({}, {"w8a8": 1})),
    *(workload("epilogue", "fc_in", 256, options={"gelu": 1, **options}) for options in ({}, {"w8a8": 1})),
    *(workload("backward", layer, m, options={"backward": 1}) for layer in SHAPES for m in (16, 256)),
    *(workload("isa", "fc_out", m, isa=isa, options=options) for m in (4, 16, 256) for isa in ("avx512", "avx2")
      for options in ({}, {"w8a8": 1})),
    *(workload("cuda", "fc_in", m, device="cuda", options=options) for m in (1, 256) for options in ({}, {"w8a8": 1})),
]  # fmt: skip


@pytest.mark.parametrize("workload", WORKLOADS)
def test_int8_linear(compare, workload):
    compare(workload)
