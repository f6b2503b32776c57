"""csrc/cuda/page_copy.cu: its source emulated, its compiled PTX executed, and what each chip needs for it.

Against a copy page by page, through `PagePool`, and every byte of the pool is compared.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import cases
import pytest
import torch

from gpu.nvcc import ROOT, asan_runtime, assembled, emulated, emulation, executed, launches, needs_nvcc, ptx, ptx_file
from gpu.ptx import PtxTrap
from limber_fast import native, use_backend
from limber_fast.backends import cuda
from limber_fast.cache import PagePool
from limber_fast.dispatch import BackendUnavailable
from limber_fast.report.aot.chips import CHIPS

STEM = "page_copy"
# layers, heads, dims, dtype, page size: below a block's tile of 16 KiB, of several with a rest, and its scales.
POOLS = {
    "one vector": (1, 1, 1, torch.bfloat16, 4),
    "half a tile": (3, 2, 64, torch.float16, 8),
    "tiles and a rest": (2, 3, 256, torch.bfloat16, 16),
    "int8": (3, 2, 80, torch.int8, 16),
    "int8, scales in a tile of their own": (2, 4, 128, torch.int8, 16),
    "int8, scales in three of a lane's four vectors, and a tile": (2, 125, 1, torch.int8, 16),
}


def pool_of(name: str, pages: int = 12, device: str = "cpu") -> PagePool:
    layers, heads, dims, dtype, size = POOLS[name]
    budget = pages * PagePool.bytes_of_page(layers, heads, dims, dtype, size)
    pool = PagePool(layers, heads, dims, dtype=dtype, budget_bytes=budget, page_size=size, device=device)
    for seed, x in enumerate((pool.storage, pool.scales)):
        if x is not None:
            x.view(torch.uint8).random_(generator=torch.Generator(device).manual_seed(seed))
    return pool


def held(pool: PagePool) -> list[torch.Tensor]:
    return [x.view(torch.uint8) for x in (pool.storage, pool.scales) if x is not None]


def check(pool: PagePool, pairs: list[tuple[int, int]]) -> None:
    """The kernel copies what it should and leaves every other byte."""
    expected = [x.clone() for x in held(pool)]
    for x in expected:
        for source, target in pairs:
            x[:, target] = x[:, source]
    assert cuda.page_copy_supports(pool.storage, pool.scales) is None
    cuda.page_copy(pool.storage, pool.scales, pairs)
    assert all(torch.equal(x, y) for x, y in zip(held(pool), expected, strict=True))


@needs_nvcc
@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("name", POOLS)
def test_emulated(name, seed):
    with emulated(seed):
        check(pool_of(name), [(3, 11), (3, 0), (7, 4)])
        check(pool_of(name), [])


@needs_nvcc
def test_more_pairs_than_a_launch_holds():
    order = cases.permutation(1200)
    pairs = [(order[i % 600], order[600 + i]) for i in range(600)]
    with emulated():
        check(pool_of("one vector", 1200), pairs)
    with launches(lambda launch: grids.append(launch.grid)):
        grids: list[tuple[int, int]] = []
        cuda.page_copy(pool_of("one vector", 1200).storage, None, pairs)
    assert grids == [(1, 256), (1, 256), (1, 88)]


@needs_nvcc
@pytest.mark.parametrize("name", POOLS)
def test_ptx(name):
    """Bounds and alignment, and no block touches what another one writes."""
    with executed("sm_80", races=True) as done:
        check(pool_of(name), [(3, 11), (3, 0), (7, 4)])
    assert len(done) == 1


@needs_nvcc
def test_ptx_of_a_page_that_is_read_and_written_is_a_race():
    """What the binding refuses, and why."""
    pool = pool_of("half a tile")
    with executed("sm_80", races=True), pytest.raises(PtxTrap, match="race"):
        cuda.page_copy(pool.storage, None, [(3, 11), (11, 2)])


def forks_that_write(pool: PagePool) -> tuple[list, list[int]]:
    """Sequences that write into pages they share, and how many tokens each has before."""
    trunk, other = pool.sequence(), pool.sequence()
    pool.batch([trunk, other], [pool.page_size + 3, 2])
    sequences = [trunk.fork(), trunk.fork(pool.page_size + 1), other.fork(), trunk]
    before = [s.length for s in sequences]
    pool.batch(sequences, [1, 2, 1, 1])
    return sequences, before


@needs_nvcc
@pytest.mark.parametrize("name", ["half a tile", "int8"])
def test_a_pool_copies_all_that_a_batch_shares_at_once(monkeypatch, name):
    calls, copy = [], cuda.page_copy
    monkeypatch.setattr(cuda, "page_copy", lambda *args: calls.append(args[2]) or copy(*args))
    plain = pool_of(name)
    true, before = forks_that_write(plain)
    with emulated():
        pool, other = pool_of(name), pool_of(name)
        with use_backend("eager"):
            forks_that_write(other)
        assert not calls
        found, _ = forks_that_write(pool)
    assert [len(pairs) for pairs in calls] == [4] and pool.stats() == plain.stats()
    for one, other, tokens in zip(found, true, before, strict=True):
        assert one.pages == other.pages
        used = (tokens - 1) % pool.page_size + 1
        for x, y in zip(held(pool), held(plain), strict=True):
            assert torch.equal(x[:, one.pages[-1], :, :, :used], y[:, one.pages[-1], :, :, :used])


@needs_nvcc
def test_pools_that_the_kernel_does_not_take_copy_by_torch():
    with emulated():
        pool = PagePool(1, 1, 1, dtype=torch.bfloat16, budget_bytes=240, page_size=5)  # 20 bytes a page
        assert cuda.page_copy_supports(pool.storage, None).startswith("copies 16 bytes at a time")
        forks_that_write(pool)
        assert pool.stats()["copied_pages"] == 4
    assert cuda.page_copy_supports(pool.storage, None) == "runs on cuda tensors; got cpu"


@needs_nvcc
@pytest.mark.parametrize("target", CHIPS)
def test_gate(target):
    """No spills, 16 bytes an access, all loads before the first store."""
    (kernel,) = assembled(ptx_file(STEM, "sm_80"), target).values()
    print(f"{target}: {kernel.registers} registers")
    assert kernel.stack == 0 and not kernel.opcodes.keys() & {"LDL", "STL"}
    assert kernel.opcodes["LDG"] == kernel.opcodes["STG"] == 4 and kernel.registers <= 64
    text = ptx(STEM, "sm_80")
    assert len(re.findall(r"ld\.global\.v4\.[bu]32", text)) == len(re.findall(r"st\.global\.v4\.[bu]32", text)) == 4


BAD = {
    "alignment": (dict(pages=8), "16-byte aligned and multiples of 16 bytes"),
    "bytes": (dict(page_bytes=24), "16-byte aligned and multiples of 16 bytes"),
    "scales": (dict(scale_bytes=16), "scales of scale_bytes must be given"),
    "page": (dict(pairs=[(0, 4)]), r"pages must lie in 0 \.\. n_pages - 1"),
    "negative page": (dict(pairs=[(-1, 3)]), r"pages must lie in 0 \.\. n_pages - 1"),
    "twice": (dict(pairs=[(0, 3), (1, 3)]), "must be written once"),
    "both": (dict(pairs=[(0, 3), (3, 1)]), "must not be both read and written"),
}


@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD)
def test_bad_input(change, message):
    try:
        module = native.cuda()
    except BackendUnavailable as error:
        pytest.skip(str(error))
    call = dict(pages=16, scales=0, layers=1, n_pages=4, page_bytes=16, scale_bytes=0, pairs=[(0, 3)])
    with pytest.raises(ValueError, match="^page_copy: .*" + message):
        module.page_copy(**call | change, device=0, stream=0)


@needs_nvcc
@pytest.mark.slow_gpu
def test_address_sanitizer(tmp_path):
    libraries = {STEM: str(emulation(STEM, "-fsanitize=address", "-g", "-O1"))}
    program = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from gpu import test_page_copy as t
for name in t.POOLS:
    with t.emulated(5, libraries={libraries!r}):
        t.check(t.pool_of(name), [(3, 11), (3, 0), (7, 4)])
print("done")
"""
    environment = os.environ | {"LD_PRELOAD": asan_runtime(), "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment,
                          cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0 and done.stdout.strip() == "done", done.stdout + done.stderr[-4000:]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", POOLS)
def test_on_a_device(name):
    """Also captured: a graph copies again what the pages hold by then."""
    pool = pool_of(name, device="cuda")
    check(pool, [(3, 11), (3, 0), (7, 4)])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda.page_copy(pool.storage, pool.scales, [(1, 5)])
    for x in held(pool):
        x[:, 1] = 77
    graph.replay()
    assert all((x[:, 5] == 77).all() for x in held(pool))
