"""csrc/cuda/prefix_attention.cu, the production source and launcher, on the host emulation: against float64."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import cases
import pytest
import torch
from ops.test_prefix_attention_values import GROUPS, Call

from gpu.nvcc import ROOT, asan_runtime, emulated, emulation, needs_nvcc
from limber_fast import PagedBatch, prefix_attention
from limber_fast.reference.prefix_attention import prefix_attention as reference

pytestmark = [needs_nvcc, pytest.mark.usefixtures("poisoned")]
DTYPES = (torch.bfloat16, torch.float16)
# Threads in their order and copies as late as they may be; then any order, copies at once.
MODES = {"late": (0, False), "shuffled": (5, False), "eager": (7, True)}


@pytest.fixture(params=MODES)
def mode(request):
    with emulated(*MODES[request.param]):
        yield request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("step", cases.STEPS)
def test_sequences_alone(mode, step, dtype):
    call = Call(dtype, 2, 64)
    call.check("cuda", *call.alone(cases.STEPS[step]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fork", cases.FORKS)
def test_shared_prefixes(mode, fork, dtype):
    call = Call(dtype, 2, 64)
    prefixes, members = cases.FORKS[fork]
    call.check("cuda", *call.forked(prefixes, members, cases.permutation(len(members))))


def test_groups_side_by_side(mode):
    call = Call(torch.bfloat16, 2, 64)
    call.check("cuda", *call.groups(*GROUPS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims, rotary_dims", [(64, 64), (128, 2), (256, 64), (256, 0)])
def test_head_dimensions(mode, dims, rotary_dims, dtype):
    call = Call(dtype, 3, dims, rotary_dims=rotary_dims)
    sequences, queries = call.forked(*cases.FORKS["nested"])
    alone = call.alone(((20, 30), (0, 1)))
    call.check("cuda", sequences + alone[0], queries + alone[1], scale=0.2)


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_page_sizes(mode, page_size):
    call = Call(torch.float16, 2, 64, page_size=page_size, shuffled=True)
    sequences, queries = call.forked(*cases.FORKS["nested"])
    alone = call.alone(cases.STEPS["mixed"])
    call.check("cuda", sequences + alone[0], queries + alone[1])


# Prefixes and private parts over the places where splits begin, 256 and 512, and rows of more than one tile.
LONG = {
    "prefix over two splits": ((300,), tuple((i % 5, 1) for i in range(35))),
    "nested over three": ((250, 264, 530), ((0, 1), (3, 2), (7, 1), (40, 1))),
    "private over two": ((40,), ((260, 1), (215, 15), (216, 3), (500, 1))),
    "prefill beside decode": ((270,), ((0, 1), (9, 50), (2, 15), (2, 16))),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fork", LONG)
def test_splits(mode, fork, dtype):
    call = Call(dtype, 2, 64)
    call.check("cuda", *call.forked(*LONG[fork]))


@pytest.mark.parametrize("sharp, offset", [(0.0, 0.0), (50.0, 0.0), (0.5, 300.0)])
def test_flat_and_sharp_softmax_and_logits_of_1e4(mode, sharp, offset):
    call = Call(torch.float16, 2, 64, sharp=sharp, offset=offset, rotary_dims=0)
    rounded = 2**-23 * 64**-0.5 * (offset**2 + 64 * 6 * sharp)  # fp32 rounds the logits, in any order of the sum
    call.check("cuda", *call.forked(*LONG["prefix over two splits"]), more=rounded)


@pytest.mark.parametrize("size", [1e-20, 1e30])
def test_values_beyond_fp16(mode, size):
    """Parts are fp16 over a scale of their own."""
    call = Call(torch.bfloat16, 1, 64, rotary_dims=0)
    sequences, queries = call.forked(*LONG["prefix over two splits"])
    batch, pages = call.pool.batch(sequences, queries), call.pool.layer(0)
    q, k, v = call.rows(batch.tokens)
    pages[:, :, 1] *= size
    arguments = (queries, [s.length for s in sequences], [s.pages for s in sequences])
    true, _ = reference(q.double(), k.double(), size * v.double(), pages.double(), *arguments)
    found = prefix_attention(q, k, (size * v.double()).bfloat16(), pages, batch, backend="cuda")
    assert max(cases.errors(found, true)) <= 2 * cases.FLOOR[torch.bfloat16]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", ["q", "k", "v", "cached k", "cached v"])
def test_nan_and_inf_reach_those_who_see_them(place, value):
    with emulated():
        Call(torch.bfloat16, 2, 64, rotary_dims=0).check_who_sees("cuda", place, value)


def test_nothing_new():
    with emulated():
        for batch, n in ((PagedBatch([0, 0], [5, 0], [[3], []]), 4), (PagedBatch([], [], []), 1)):
            rows, pages = torch.empty(3, 0, 2, 64).half(), torch.zeros(n, 2, 2, 8, 64).half()
            assert prefix_attention(*rows, pages, batch, backend="cuda").shape == (0, 2, 64)


def test_the_same_bits_in_any_order():
    """Nothing depends on which thread goes first; a sequence's result hardly on its batch."""
    found = []
    for mode in MODES.values():
        call = Call(torch.bfloat16, 2, 64)
        sequences, queries = call.forked(*LONG["nested over three"])
        batch = call.pool.batch(sequences, queries)
        with emulated(*mode):
            found.append(prefix_attention(*call.rows(batch.tokens), call.pool.layer(0), batch, backend="cuda"))
    assert all(torch.equal(found[0], other) for other in found[1:])


def _without(source: str, statement: str, index: int) -> str:
    """The source with one occurrence of a statement left out."""
    at = [found.start() for found in re.finditer(re.escape(statement), source)][index]
    return source[:at] + source[at + len(statement) :]


@pytest.mark.slow_gpu
@pytest.mark.parametrize("statement, index", [
    *(("__syncthreads();", i) for i in range(7)), ("ptx::wait_copies<1>();", 0), ("ptx::wait_copies<2>();", 0),
])  # fmt: skip
def test_a_missing_barrier_or_wait_is_noticed(tmp_path, statement, index):
    """By some order of the threads or some timing of the copies, at 37 rows that fill every row of a tile."""
    path = tmp_path / "cuda" / "prefix_attention.cuh"
    path.parent.mkdir()
    path.write_text(_without((ROOT / "csrc/cuda/prefix_attention.cuh").read_text(), statement, index))
    libraries = {"prefix_attention": str(emulation("prefix_attention", f"-I{tmp_path}"))}

    def sound(mode) -> bool:
        with emulated(*mode, libraries=libraries):
            for dims in (64, 256):
                call = Call(torch.bfloat16, 2, dims)
                try:
                    call.check("cuda", *call.forked(*LONG["prefix over two splits"]))
                    call.check("cuda", *call.forked(*LONG["nested over three"]))
                    call.check("cuda", *call.alone(cases.STEPS["chunks"]))
                except AssertionError:
                    return False
        return True

    assert not all(sound((seed, eager)) for eager in (False, True) for seed in range(4))


@pytest.mark.slow_gpu
def test_address_sanitizer(tmp_path):
    """Every access of the kernels, to shared memory too, lies inside what was allocated."""
    flags = ("-fsanitize=address", "-g", "-O1")
    libraries = {stem: str(emulation(stem, *flags)) for stem in ("prefix_attention", "page_copy")}
    program = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import torch, cases
from gpu.nvcc import emulated
from gpu import test_prefix_attention_emulated as t, test_prefix_attention_int8_emulated as i
with emulated(3, libraries={libraries!r}):
    for dtype in t.DTYPES:
        for dims in (64, 256):
            for fork in t.LONG.values():
                call = t.Call(dtype, 2, dims)
                call.check("cuda", *call.forked(*fork))
            call = t.Call(dtype, 2, dims)
            call.check("cuda", *call.alone(cases.STEPS["mixed"]))
            for what in i.LONG.values():
                i.Int8Call(dtype, dims).check("cuda", **what)
print("done")
"""
    environment = os.environ | {"LD_PRELOAD": asan_runtime(), "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment,
                          cwd=Path(tmp_path))  # fmt: skip
    assert done.returncode == 0 and done.stdout.strip() == "done", done.stdout + done.stderr[-4000:]
