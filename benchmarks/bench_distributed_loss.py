"""ClipLoss over two processes, forward and backward, against the gathered loss in eager PyTorch and open_clip's own.

This process is rank 0, with half of the threads; a child is rank 1 with the other half and runs whatever this one runs.
Times are rank 0's, which cannot end before rank 1's, memory is rank 0's. Both on one machine: gathering costs a copy.
"""

from __future__ import annotations

import datetime
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn
import torch.nn.functional as F
from bench_info_nce import BASELINE_TOLERANCE, TOLERANCE, cases, expected, rows_checked, towers
from comparison import Trial, Workload
from torch import Tensor

from limber_fast import ClipLoss, native

RANKS, D = 2, 512
SIZES = (512, 1024, 2048, 4096)
DTYPES = ("float32", "bfloat16")


def eager(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Each rank's rows against all of the other tower, with gradients through the gathering; the mean over ranks."""
    images, texts = (torch.cat(torch.distributed.nn.all_gather(x)) for x in (image, text))
    labels = torch.arange(len(image)) + dist.get_rank() * len(image)
    scaled = scale * torch.cat([image, text])
    logits = (scaled[: len(image)] @ texts.T, scaled[len(image) :] @ images.T)
    return sum(F.cross_entropy(x, labels) for x in logits) / 2


@cache
def losses() -> dict[str, Callable[..., Tensor]]:
    found: dict[str, Callable[..., Tensor]] = {"limber_fast": ClipLoss(group=dist.group.WORLD), "eager": eager}
    if find_spec("open_clip"):
        from open_clip.loss import ClipLoss as Theirs

        where = {"rank": dist.get_rank(), "world_size": RANKS, "gather_with_grad": True}
        found["open_clip_local"], found["open_clip"] = Theirs(local_loss=True, **where), Theirs(**where)
    return found


@lru_cache(maxsize=1)
def inputs(n: int, dtype: str) -> tuple[Tensor, ...]:
    image, text, scale = towers(n, D, dtype, "cpu")
    own = slice(dist.get_rank() * n // RANKS, (dist.get_rank() + 1) * n // RANKS)
    return *(x[own].clone().requires_grad_() for x in (image, text)), torch.tensor(scale, requires_grad=True)


def step(name: str, n: int, dtype: str) -> tuple[Tensor, ...]:
    leaves = inputs(n, dtype)
    loss = losses()[name](*leaves)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def join(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS,
                            timeout=datetime.timedelta(minutes=3))  # fmt: skip


def serve(pipe: Any, store: str, threads: int) -> None:
    torch.set_num_threads(threads)
    join(1, store)
    while (job := pipe.recv()) is not None:
        step(*job)


class Pair:
    """Both ranks take a step at once; this process's threads are half of what they were meanwhile."""

    def __init__(self, pipe: Any, threads: int) -> None:
        self.pipe, self.threads = pipe, threads

    def __call__(self, name: str, n: int, dtype: str) -> tuple[Tensor, ...]:
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        self.pipe.send((name, n, dtype))
        result = step(name, n, dtype)
        torch.set_num_threads(before)
        return result


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    context, threads = multiprocessing.get_context("spawn"), max(1, torch.get_num_threads() // RANKS)
    mine, theirs = context.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder, "store"))
        child = context.Process(target=serve, args=(theirs, store, threads), daemon=True)
        child.start()
        join(0, store)
        yield Pair(mine, threads)
        mine.send(None)
        child.join()
        dist.destroy_process_group()
        losses.cache_clear()


def prepare(pair: Pair, workload: Workload) -> Trial:
    n, dtype = workload.shape["N"], workload.dtype
    sample = rows_checked(n, "cpu")
    sample = sample[sample < n // RANKS]
    inputs(n, dtype)

    def errors(result: tuple[Tensor, ...]) -> dict[str, float]:
        """Of rank 0: its gradients are as many times those of one process as there are ranks."""
        _, d_image, d_text, _ = result
        true = expected(n, D, dtype, "cpu")
        pairs = {"image gradient": (d_image, true["image gradient"]), "text gradient": (d_text, true["text gradient"])}
        found = {name: max(cases.errors(x[sample] / RANKS, y[: len(sample)])) for name, (x, y) in pairs.items()}
        return found

    def errors_of_ours(result: tuple[Tensor, ...]) -> dict[str, float]:
        true = expected(n, D, dtype, "cpu")
        pairs = {"loss": (result[0], true["loss"]), "scale gradient": (result[3], true["scale gradient"])}
        return errors(result) | {name: max(cases.errors(*pair)) for name, pair in pairs.items()}

    item = getattr(torch, dtype).itemsize
    # Of both ranks: two products forward and four backward, or two where the slabs are in the caches.
    native_bf16 = dtype == "bfloat16" and native.cpu().bf16_products
    cached = min(1.0, 256 * 2**20 / (n * n * (2 if native_bf16 else 4)))
    return Trial(
        ours=lambda: (*pair("limber_fast", n, dtype), True),
        baselines={name: lambda name=name: (*pair(name, n, dtype), False) for name in list(losses())[1:]},
        # A rank's share of the loss, which the local ones return, is no global number to check.
        errors=lambda result: (errors_of_ours if result[-1] else errors)(result[:-1]),
        tolerance=TOLERANCE[dtype], baseline_tolerance=BASELINE_TOLERANCE[dtype],
        flops=(12 - 4 * cached) * n * n * D, bytes=2 * RANKS * n * D * item,
    )  # fmt: skip


def workload(n: int, dtype: str):
    row = Workload("distributed_loss", "size", {"N": n, "D": D}, dtype, cost=8 * n * n * D, prepare=None,
                   options={"ranks": RANKS}, stem="info_nce")  # fmt: skip
    return pytest.param(row, id=f"size-{row.name}", marks=[pytest.mark.quick] if n <= 1024 else [])


@pytest.mark.parametrize("workload", [workload(n, dtype) for n in SIZES for dtype in DTYPES])
def test_distributed_loss(compare, pair, workload):
    compare(replace(workload, prepare=partial(prepare, pair)))
