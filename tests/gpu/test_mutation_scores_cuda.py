"""The mutation scores of the CUDA extension's kernels, as nvcc compiles them: see test_mutation_scores.py.

Builds of every kind of a template count together: both dtypes, tiles of 16 and of 32 rows, heads of 64 dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops.test_prefix_attention_values import Call
from torch import Tensor

from gpu import test_page_copy as of_page_copy
from gpu.nvcc import needs_nvcc, ptx_of_kernel
from gpu.ptx import execute
from gpu.ptx.mutate import mutation_score
from gpu.replay import of_nvcc
from gpu.test_mutation_scores import GOAL, LONGEST, MUTANTS, TARGETS, Check, Problem, _step
from gpu.test_prefix_attention_int8_emulated import Int8Call
from gpu.unobservable import unobservable
from limber_fast import prefix_attention
from limber_fast.backends import cuda

pytestmark = [needs_nvcc, pytest.mark.slow_gpu, pytest.mark.usefixtures("poisoned")]


def _int8_step(dtype: torch.dtype, *, dims: int = 64, rotary: bool = True, sharp: float = 1.0, **what: Any) -> Problem:
    """Over int8 pages: out, and the integers and scales, which are eager's."""
    made = Int8Call(dtype, dims, rotary=rotary)
    sequences, queries = made.sequences("eager", **what)
    batch = made.pool.batch(sequences, queries)
    before, (q, k, v) = (made.pages.clone(), made.scales.clone()), made.rows(batch.tokens)
    rows = (q * sharp, k, v)

    def ours() -> list[Tensor]:
        pages, scales = (x.clone() for x in before)
        out = prefix_attention(*rows, pages, batch, page_scales=scales, rotary=made.rotary)
        return [out, pages.double(), scales]

    def reference() -> list[Tensor]:
        made.attend("eager", rows, batch)
        return [made.true(rows, batch, sequences, queries), made.pages.double(), made.scales.double()]

    def results(function: Callable[[], list[Tensor]], dtype: torch.dtype | None = None) -> list[Tensor]:
        out, pages, scales = function()
        return [out, pages, scales.nan_to_num()]  # unused places are NaN

    return Problem(results, ours, reference)


def _copies(name: str, pairs: list[tuple[int, int]], **options: Any) -> Problem:
    """Every byte of a pool after the copies."""
    pool = of_page_copy.pool_of(name, **options)
    before = [x.clone() for x in of_page_copy.held(pool)]

    def ours() -> list[Tensor]:
        cuda.page_copy(pool.storage, pool.scales, pairs)
        return of_page_copy.held(pool)

    def reference() -> list[Tensor]:
        found = [x.clone() for x in before]
        for x in found:
            for source, target in pairs:
                x[:, target] = x[:, source]
        return found

    def results(function: Callable[[], list[Tensor]], dtype: torch.dtype | None = None) -> list[Tensor]:
        for x, y in zip(of_page_copy.held(pool), before, strict=True):
            x.copy_(y)
        return [x.double() for x in function()]

    return Problem(results, ours, reference)


# Five nested runs, over a split; private parts of one trip, of several and over a split; up to 15 new tokens, whose
# rows lie in more than one tile of a run. Rows of the second launch in tiles of 16, and of 32, prefills among them.
PREFIXES = ((8, 20, 40, 61, 270), (8, 20, 40, 256, 300))
MEMBERS = ((0, 1), (3, 9), (1, 5), (2, 4), (100, 2), (70, 6), (2, 8), (40, 3), (0, 12), (260, 3))
DECODE = (*MEMBERS, *((i % 5, 1) for i in range(12)))
PREFILL = (*MEMBERS, (9, 18), (0, 70))


class Sized(Call):
    """Values far from 1: parts are fp16 over a scale of their own."""

    def __init__(self, *args: Any, size: float, **options: Any) -> None:
        self.size = size
        super().__init__(*args, **options)

    def rows(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().rows(*args, **options)
        return q, k, (v.double() * self.size).to(v.dtype)


def _steps_of(dtype: torch.dtype, size: float) -> list[Problem]:
    """The maxima of sharp ones must not be missed: beside another the sums are infinite."""
    forks = [
        _step(members, 64, dtype, prefixes=prefixes, heads=1, rotary_dims=dims, turned=turned, sharp=sharp)
        for dims, sharp in ((16, 1.0), (0, 50.0))
        for members, prefixes, turned in ((DECODE, PREFIXES[0], dims > 0), (PREFILL, PREFIXES[1], False))
    ]
    few = ((0, 1), (3, 9), (1, 12), (2, 8))
    return [*forks, _step(few, 64, dtype, prefixes=(20, 270), heads=1, rotary_dims=0, kind=Sized, size=size)]


def _int8_steps() -> list[Problem]:
    """Over one prefix. Where nothing is rotated, what is stored has eager's bits."""
    return [
        _int8_step(dtype, rotary=sharp == 1, sharp=sharp, prefix=300, members=members)
        for dtype, sharp in ((torch.bfloat16, 1.0), (torch.float16, 1.0), (torch.float16, 50.0))
        for members in (DECODE, PREFILL)
    ]


STEPS = {
    "bf16": lambda: _steps_of(torch.bfloat16, 1e30),
    "fp16": lambda: _steps_of(torch.float16, 1e-3),
    "int8": _int8_steps,
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("pages", STEPS)
def test_prefix_attention(pages, target):
    Check("prefix_attention", STEPS[pages](), of_nvcc(target)).reach_the_goal()


@pytest.mark.parametrize("target", TARGETS)
def test_page_copy(target):
    problems = [_copies(name, [(3, 11), (3, 0), (7, 4)]) for name in of_page_copy.POOLS]
    Check("page_copy", problems, of_nvcc(target)).reach_the_goal()


@pytest.mark.parametrize("target", TARGETS)
def test_read_words(target):
    """Every word once: the sum of all blocks' partials modulo 2^32, of words that tell places apart."""
    kernel = "_ZN6limber17read_words_kernelEPK5uint4lPj"
    text = ptx_of_kernel("ceilings", kernel, target)
    words = torch.randint(-(2**31), 2**31, (4 * 7000,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))

    def verdict(changed: str) -> bool:
        for races in (False, True):
            for vectors, blocks in ((7000, 3), (3 * 3 * 256 + 5, 3), (2, 1)):
                source, partials = words[: 4 * vectors].clone(), torch.full((blocks,), -1, dtype=torch.int32)
                execute(changed, (blocks,), (256,), [source, vectors, partials], races=races, max_instructions=LONGEST)
                if (partials.sum(dtype=torch.int64) - source.sum(dtype=torch.int64)) % 2**32:
                    return False
        return True

    reasons = unobservable("read_words_kernel")
    score = mutation_score(text, verdict, count=MUTANTS, race_checked=True, unobservable=reasons)
    print(f"\nread_words_kernel {target}: {score.report()}")
    assert score.rate >= GOAL and score.total >= 20
