"""project_concat: soft prompts into the embedded sequence, and the projection's gradients, against eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import cases
import pytest
import torch
import torch.nn.functional as F
from comparison import Trial, Workload, compiled
from torch import Tensor

from limber_fast import project_concat

# k and D of LiMBeR's encoders; E is the width of GPT-J.
ENCODERS = {"clip": (144, 3072), "beit": (196, 1024), "nfrn50": (1, 2048)}
E, TEXT, VOCABULARY, IMAGE = 4096, 32, 50400, 50400
DTYPES = ("float32", "bfloat16")
TOLERANCE = {"float32": 2e-5, "bfloat16": 1e-2}
BASELINE_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
SAMPLED = 64  # soft prompts and rows of the weight's gradient that are held against float64
P, SEED, EPS = 0.1, 1, 1e-5


@lru_cache(maxsize=1)
def tensors(b: int, images: int, k: int, d: int, e: int, dtype: str, device: str) -> dict[str, Tensor]:
    """Each row: images, then text, `images` times over in equal parts."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, getattr(torch, dtype))

    text = torch.randint(VOCABULARY, (b, images, TEXT // images), generator=generator)
    input_ids = torch.cat([torch.full((b, images, k), IMAGE), text], 2).reshape(b, -1).to(device)
    return {
        "features": normal(b * images, k, d), "weight": normal(e, d, scale=d**-0.5), "bias": normal(e),
        "embedding": normal(VOCABULARY, e), "ln_weight": normal(e) + 1, "ln_bias": normal(e), "input_ids": input_ids,
        "grad": normal(*input_ids.shape, e),
    }  # fmt: skip


def eager(x: dict[str, Tensor], images: int, dropout: bool, norm: bool) -> Tensor:
    """One image in front: linear and concatenation, as LiMBeR's own code; several: put into their rows."""
    soft_prompts = F.linear(x["features"], x["weight"], x["bias"])
    if dropout:
        soft_prompts = F.dropout(soft_prompts, P)
    if norm:
        soft_prompts = F.layer_norm(soft_prompts, (E,), x["ln_weight"], x["ln_bias"], EPS)
    k = x["features"].shape[1]
    if images == 1:
        return torch.cat([soft_prompts, F.embedding(x["input_ids"][:, k:], x["embedding"])], 1)
    is_image = x["input_ids"] == IMAGE
    inputs_embeds = F.embedding(x["input_ids"].masked_fill(is_image, 0), x["embedding"])
    inputs_embeds[is_image] = soft_prompts.flatten(0, 1)
    return inputs_embeds


def fused(x: dict[str, Tensor], images: int, dropout: bool, norm: bool) -> Tensor:
    return project_concat(
        x["features"], x["weight"], x["bias"], x["input_ids"], x["embedding"], image_token_id=IMAGE,
        dropout_p=P if dropout else 0.0, seed=SEED, layer_norm=(x["ln_weight"], x["ln_bias"], EPS) if norm else None,
    )  # fmt: skip


def prepare(workload: Workload) -> Trial:
    shape, options = workload.shape, workload.options
    b, images, k, d, e = (shape[letter] for letter in ("B", "images", "k", "D", "E"))
    dropout, norm = bool(options.get("dropout")), bool(options.get("norm"))
    x = tensors(b, images, k, d, e, workload.dtype, workload.device)
    trained = [] if options.get("forward") else ["weight", "bias"]
    trained += ["features"] * bool(options.get("tuned")) + ["ln_weight", "ln_bias"] * norm

    def run(function: Callable[..., Tensor]) -> Callable[[], dict[str, Tensor]]:
        mine = {
            name: value.detach().requires_grad_(name in trained) for name, value in x.items() if name != "input_ids"
        }
        mine["input_ids"] = x["input_ids"]

        def call() -> dict[str, Tensor]:
            out = function(mine, images, dropout, norm)
            leaves = [mine[name] for name in trained]
            gradients = torch.autograd.grad(out, leaves, mine["grad"]) if trained else ()
            return {"inputs_embeds": out.detach(), **dict(zip(trained, gradients, strict=True))}

        return call

    rows, is_image = b * images * k, x["input_ids"] == IMAGE
    features, grad = x["features"].reshape(rows, d), x["grad"][is_image]

    def errors(result: dict[str, Tensor]) -> dict[str, float]:
        text = F.embedding(x["input_ids"][~is_image], x["embedding"])
        found = {"text rows": float(not torch.equal(result["inputs_embeds"][~is_image], text))}
        if dropout or norm:  # eager draws another mask; the tests compare these
            return found | {name: 0.0 if value.isfinite().all() else torch.inf for name, value in result.items()}
        sample = torch.linspace(0, rows - 1, min(rows, SAMPLED)).long()
        columns = torch.linspace(0, e - 1, min(e, SAMPLED)).long()
        weight, bias = x["weight"].double(), x["bias"].double()
        out = result["inputs_embeds"][is_image]
        pairs = {"soft prompts": (out[sample], features[sample].double() @ weight.T + bias)}
        if "weight" in result:
            pairs["weight gradient"] = (result["weight"][columns], grad[:, columns].double().T @ features.double())
            pairs["bias gradient"] = (result["bias"], grad.double().sum(0))
            # Linear in the parameters: known without the rows that are not sampled. Relative to the sizes in it.
            total = (weight * result["weight"]).sum() + (bias * result["bias"]).sum()
            size = out.double().norm() * grad.double().norm()
            found["<parameters, gradients>"] = float((total - (out.double() * grad).sum()).abs() / size)
        if "features" in result:
            exact = grad[sample].double() @ weight
            pairs["features gradient"] = (result["features"].reshape(rows, d)[sample], exact)
        return found | {name: max(cases.errors(*pair)) for name, pair in pairs.items()}

    baselines = {"eager": run(eager)}
    if workload.group == "cuda":
        baselines["compile"] = run(compiled(eager))
    size = x["weight"].element_size()
    products = 1 + len({"weight", "features"} & set(trained)) + (norm and bool(trained))
    passes = 2 if trained else 1  # the backward reads the features and the gradient, and writes the weight's
    return Trial(
        ours=run(fused), baselines=baselines, errors=errors, tolerance=TOLERANCE[workload.dtype],
        baseline_tolerance=BASELINE_TOLERANCE[workload.dtype], flops=2.0 * rows * d * e * products,
        bytes=passes * (e * d + rows * (d + e)) * size + 2 * b * TEXT * e * size,
        bound="bytes" if options.get("forward") and k == 1 else "flops",
    )  # fmt: skip


def workload(group: str, encoder: str, dtype: str, b: int = 8, images: int = 1, *, quick: bool = False, **fields):
    k, d = ENCODERS[encoder]
    row = Workload("project_concat", group, {"B": b, "images": images, "k": k, "D": d, "E": E}, dtype,
                   cost=6 * b * images * k * d * E, prepare=prepare, **fields)  # fmt: skip
    return pytest.param(row, id=f"{group}-{row.name}", marks=[pytest.mark.quick] if quick else [])


WORKLOADS = [
    *(workload(encoder, encoder, dtype, quick=encoder == "nfrn50") for encoder in ENCODERS for dtype in DTYPES),
    *(workload("large_batch", "nfrn50", dtype, b=256) for dtype in DTYPES),
    # One soft prompt an image: the weight is read once and nothing else counts.
    *(workload("forward", encoder, dtype, options={"forward": 1}, quick=encoder == "nfrn50")
      for encoder in ("nfrn50", "clip") for dtype in DTYPES),
    *(workload("few_shot", "clip", "bfloat16", b=2, images=4, options=options) for options in ({}, {"forward": 1})),
    *(workload("options", "clip", "bfloat16", options=options)
      for options in ({"dropout": 1}, {"tuned": 1}, {"dropout": 1, "norm": 1}, {"dropout": 1, "norm": 1, "tuned": 1})),
    *(workload("isa", "beit", dtype, b=2, isa=isa) for isa in ("avx512", "avx2", "baseline") for dtype in DTYPES),
    *(workload("cuda", encoder, dtype, b=64, device="cuda") for encoder in ENCODERS for dtype in DTYPES),
]  # fmt: skip


@pytest.mark.parametrize("workload", WORKLOADS)
def test_project_concat(compare, workload):
    compare(workload)
