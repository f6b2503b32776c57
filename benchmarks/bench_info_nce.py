"""InfoNCE, forward and backward over two [N, D] towers and the scale: fused against the dense N x N logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import cases
import pytest
import torch
import torch.nn.functional as F
from comparison import Trial, Workload, add_peer, available_bytes, compiled
from torch import Tensor

from limber_fast import info_nce, native
from limber_fast.report.loss_timing import EAGER_MATRICES

SIZES = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
WIDTHS = (64, 128, 256, 768, 1024, 2048)
DTYPES = ("float32", "bfloat16")
# Peers, and eager in fp32 beside bf16, up to this N: beyond it they cost minutes and repeat what smaller rows say.
LARGEST_OF_PEERS = 8192
ALL_ROWS_CHECKED, SAMPLED = 2048, 256  # gradient rows: all up to this N, then so many
TOLERANCE = {"float32": 2e-5, "bfloat16": 1e-2}
BASELINE_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2}


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    logits = (scale * image) @ text.T
    labels = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def open_clip() -> Loss:
    from open_clip.loss import ClipLoss

    return ClipLoss()


def inf_cl() -> Loss:
    from inf_cl import cal_flash_loss

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        if image.shape[1] % 256:
            raise ValueError(f"inf_cl takes multiples of 256 features; got {image.shape[1]}")
        return (cal_flash_loss(image, text, scale=scale) + cal_flash_loss(text, image, scale=scale)).mean() / 2

    return loss


def liger() -> Loss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    cross_entropy = LigerFusedLinearCrossEntropyLoss()

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        labels, scaled = torch.arange(len(image), device=image.device), scale * image
        return (cross_entropy(text, scaled, labels) + cross_entropy(scaled, text, labels)) / 2

    return loss


# The packages that compute the same loss; the last two on CUDA alone.
PEERS = {"open_clip": open_clip, "inf_cl": inf_cl, "liger": liger}


@lru_cache(maxsize=1)
def towers(n: int, d: int, dtype: str, device: str) -> tuple[Tensor, Tensor, float]:
    image, text, scale = cases.unit(n, n, d)
    return (*(x.to(device, getattr(torch, dtype)) for x in (image, text)), scale)


@lru_cache(maxsize=1)
def expected(n: int, d: int, dtype: str, device: str) -> dict[str, Tensor]:
    """Loss, its scale gradient, and the gradients of `rows_checked` in either tower, from sums in float64.

    Streamed over rows, so it reaches sizes whose logits do not fit. The logits lie within +-15: no shift is needed.
    """
    image, text, scale = towers(n, d, dtype, device)
    # Products in fp32 are exact to 1e-6 here, and four times as fast; only the largest sizes need that.
    work = torch.float64 if n <= 8192 else torch.float32
    image, text = image.to(work), text.to(work)
    row, row_x, col, col_x = torch.zeros(4, n, dtype=torch.float64, device=device)
    for part in torch.arange(n, device=device).split(512):
        x = scale * (image[part] @ text.T).double()
        e = x.exp()
        row[part], col = e.sum(1), col + e.sum(0)
        e *= x
        row_x[part], col_x = e.sum(1), col_x + e.sum(0)

    sample = rows_checked(n, device)

    def gradient(a: Tensor, b: Tensor, own: Tensor, other: Tensor) -> Tensor:
        e = (scale * (a[sample] @ b.T).double()).exp()
        mean = (e / own[sample, None] + e / other) @ b.double() / 2
        return scale / n * (mean - b[sample].double())

    positive = scale * (image.double() * text.double()).sum(1)
    return {
        "loss": ((row.log() + col.log()) / 2 - positive).mean(),
        "scale gradient": ((row_x / row + col_x / col) / 2 - positive).mean() / scale,
        "image gradient": gradient(image, text, row, col),
        "text gradient": gradient(text, image, col, row),
    }


def rows_checked(n: int, device: str) -> Tensor:
    return torch.linspace(0, n - 1, n if n <= ALL_ROWS_CHECKED else SAMPLED, device=device).round().long()


def prepare(workload: Workload) -> Trial:
    n, d, dtype, device = workload.shape["N"], workload.shape["D"], workload.dtype, workload.device
    cache_mb = workload.options.get("cache_mb", 256)
    image, text, scale = towers(n, d, dtype, device)

    def gradients(loss: Callable[..., Tensor], to: torch.dtype = image.dtype) -> Callable[[], tuple[Tensor, ...]]:
        inputs = (*(x.detach().to(to).requires_grad_() for x in (image, text)),
                  torch.tensor(scale, device=device, requires_grad=True))  # fmt: skip

        def run() -> tuple[Tensor, ...]:
            value = loss(*inputs)
            return (value.detach(), *torch.autograd.grad(value, inputs))

        return run

    def errors(result: tuple[Tensor, ...]) -> dict[str, float]:
        loss, d_image, d_text, d_scale = result
        true, sample = expected(n, d, dtype, device), rows_checked(n, device)
        # Scaling a tower is scaling the logits: this sum over all rows is known without the reference's gradients.
        total = scale * true["scale gradient"]
        pairs = {
            "loss": (loss, true["loss"]),
            "scale gradient": (d_scale, true["scale gradient"]),
            "image gradient": (d_image[sample], true["image gradient"]),
            "text gradient": (d_text[sample], true["text gradient"]),
            "sum of image * gradient": ((image.double() * d_image).sum(), total),
            "sum of text * gradient": ((text.double() * d_text).sum(), total),
        }
        return {name: max(cases.errors(*pair)) for name, pair in pairs.items()}

    baselines, skipped = {}, {}

    def fits(name: str, matrices: int, to: torch.dtype = image.dtype) -> bool:
        need, free = matrices * n * n * to.itemsize, available_bytes(device)
        if free is not None and need > 0.8 * free:
            skipped[name] = f"needs {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        return name not in skipped

    if fits("eager", EAGER_MATRICES):
        baselines["eager"] = gradients(eager)
    if workload.group in ("size", "cuda") and n <= LARGEST_OF_PEERS:
        if dtype != "float32" and fits("eager_fp32", EAGER_MATRICES, torch.float32):
            baselines["eager_fp32"] = gradients(eager, torch.float32)
        at_most = 2 * EAGER_MATRICES  # a logits matrix of its own for each direction
        if workload.group == "cuda" and fits("compile", at_most):
            baselines["compile"] = gradients(compiled(eager))
        for name, make in PEERS.items():
            if (name == "open_clip" or workload.group == "cuda") and fits(name, at_most):
                add_peer(name, lambda make=make: gradients(make()), baselines, skipped)
    return Trial(
        ours=gradients(lambda *inputs: info_nce(*inputs, cache_mb=cache_mb)), baselines=baselines, errors=errors,
        tolerance=TOLERANCE[dtype], baseline_tolerance=BASELINE_TOLERANCE[dtype],
        flops=flops(n, d, dtype, device, cache_mb), bytes=4 * n * d * image.element_size(), skipped=skipped,
    )  # fmt: skip


def flops(n: int, d: int, dtype: str, device: str, cache_mb: float) -> float:
    """Executed: one product forward, two backward, and the recomputation of those tiles that the cache cannot hold."""
    native_bf16 = dtype == "bfloat16" and device == "cpu" and native.cpu().bf16_products
    cached = min(1.0, cache_mb * 2**20 / (n * n * (2 if native_bf16 else 4)))
    return (8 - 2 * cached) * n * n * d


def workload(group: str, n: int, d: int, dtype: str, *, quick: bool = False, **fields):
    # Long rows are their own average: three rounds of all of them would take the run past 12 minutes on two cores. The
    # rows for the speed of light are few and take more.
    longest = n > 16384 or (group == "isa" and n > 4096)
    fewest_rounds = 1 if longest else 2 if n > 8192 else 9 if group == "cache_off" else 3
    row = Workload("info_nce", group, {"N": n, "D": d}, dtype, cost=8 * n * n * d, prepare=prepare,
                   fewest_rounds=fewest_rounds, **fields)  # fmt: skip
    return pytest.param(row, id=f"{group}-{row.name}", marks=[pytest.mark.quick] if quick else [])


WORKLOADS = [
    *(workload("size", n, 512, dtype, quick=n <= 1024) for n in SIZES for dtype in DTYPES),
    *(workload("width", n, d, dtype, quick=n == 256 and d in (64, 2048))
      for n in (256, 1024, 4096) for d in WIDTHS for dtype in DTYPES),
    # Cache off: every product is made twice, so the arithmetic bounds the time: the rows for the speed of light.
    *(workload("cache_off", n, 512, dtype, quick=n == 1024, options={"cache_mb": 0})
      for n in (1024, 8192) for dtype in DTYPES),
    *(workload("isa", n, 512, dtype, quick=n == 1024, isa=isa)
      for n in (1024, 8192) for isa in ("avx2", "baseline") for dtype in DTYPES),
    *(workload("cuda", n, 512, dtype, quick=n == 1024, device="cuda")
      for n in (1024, 4096, 16384, 32768) for dtype in DTYPES),
]  # fmt: skip


@pytest.mark.parametrize("workload", WORKLOADS)
def test_info_nce(compare, workload):
    compare(workload)
