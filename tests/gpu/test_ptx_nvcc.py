"""PTX from nvcc: structs by value, divergence, local memory, generic addresses, inline assembly."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch

from gpu.ptx import PtxTrap, execute

SOURCE = Path(__file__).parent / "ptx_samples.cu"


def compile_source(folder: Path, *flags: str) -> str:
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not installed")
    target = folder / "samples.ptx"
    command = ["nvcc", "-ptx", "-O3", "-std=c++17", "-arch=sm_80", *flags, "-o", str(target), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target.read_text()


@pytest.fixture(scope="module")
def ptx(tmp_path_factory):
    return compile_source(tmp_path_factory.mktemp("nvcc"))


def test_struct_by_value(ptx):
    x, out = torch.randn(1000, generator=torch.Generator().manual_seed(0)), torch.full((1000,), torch.nan)
    params = struct.pack("@PPqfb3x", x.data_ptr(), out.data_ptr(), 1000, 0.5, -3)
    execute(ptx, (3,), (96,), [params], tensors=[x, out], entry="scale")
    torch.testing.assert_close(out, 0.5 * x - 3)


def test_struct_of_the_wrong_size(ptx):
    with pytest.raises(ValueError, match="has 32 bytes; got 8"):
        execute(ptx, (1,), (32,), [bytes(8)], entry="scale")


@pytest.mark.parametrize("threads", [64, 256])
def test_sum(ptx, threads):
    x, out = torch.rand(5000, generator=torch.Generator().manual_seed(0)), torch.zeros(1)
    execute(ptx, (3,), (threads,), [x, out, 5000], shared_bytes=4 * threads, entry="block_sum", races=True)
    assert abs(out.item() - x.double().sum().item()) < 1e-6 * 5000


def test_sum_without_a_barrier(tmp_path):
    x, out = torch.rand(500, generator=torch.Generator().manual_seed(0)), torch.zeros(1)
    text = compile_source(tmp_path, "-DWITHOUT_BARRIER")
    with pytest.raises(PtxTrap, match="race in shared memory"):
        execute(text, (1,), (128,), [x, out, 500], shared_bytes=512, entry="block_sum", races=True)


@pytest.mark.parametrize("pairs", [1, 50, 96])
def test_softmax(ptx, pairs):
    """7 rows on 2 blocks of 4 warps: one warp has nothing to do."""
    x = (4 * torch.randn(7, 2 * pairs, generator=torch.Generator().manual_seed(pairs))).bfloat16()
    out, positives = torch.full((7, 2 * pairs), torch.nan), torch.full((7,), -1, dtype=torch.int32)
    execute(ptx, (2,), (128,), [x, out, positives, 7, pairs], entry="row_softmax")
    torch.testing.assert_close(out.double(), x.double().softmax(1), rtol=2e-6, atol=1e-9)
    assert torch.equal(positives, (x > 0).sum(1).int())


def test_digits(ptx):
    x = torch.randint(0, 10**6, (300,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    out = torch.full((10,), -1, dtype=torch.int32)
    execute(ptx, (1,), (64,), [x, out, 300], entry="histogram_digits")
    digits = torch.tensor([int(d) for v in x.tolist() for d in str(v) if v])
    assert torch.equal(out, torch.bincount(digits, minlength=10).int())


def test_inline_assembly(ptx):
    a, b = (torch.randn(rows, 48, generator=torch.Generator().manual_seed(rows)).bfloat16() for rows in (16, 8))
    c = torch.full((16, 8), torch.nan)
    counts = execute(ptx, (1,), (32,), [a, b, c, 48], entry="warp_matmul", races=True)
    torch.testing.assert_close(c.double(), a.double() @ b.double().T, rtol=1e-5, atol=1e-5)
    assert counts["mma"] == 3
