"""Other compiled Triton kernels, executed from their PTX."""

from __future__ import annotations

import pytest
import torch

from gpu import samples
from gpu.ptx.launch import run_case
from gpu.ptx_sources import int8_matmul, softmax, transpose
from limber_fast.kernels.catalogue import Case

TARGETS = ["sm_80", "sm_90"]


@pytest.mark.parametrize("target", TARGETS)
def test_int8_product_is_exact(target):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-128, 128, (rows, 192), generator=generator, dtype=torch.int8) for rows in (128, 64))
    c = torch.full((128, 64), -1, dtype=torch.int32)
    counts = run_case(
        int8_matmul,
        target,
        (2, 1),
        {"a": a, "b": b, "c": c, "K": 192, "stride_a": 192, "stride_b": 192, "stride_c": 64},
    )
    assert torch.equal(c, a.int() @ b.int().T)
    assert counts["mma" if target == "sm_80" else "wgmma"] > 0


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("columns", [1, 333, 512])
def test_softmax(target, columns):
    x = 8 * torch.randn(5, columns, generator=torch.Generator().manual_seed(columns))
    x = x.bfloat16()
    out = torch.full((5, columns), torch.nan)
    run_case(softmax, target, (5,), {"x": x, "out": out, "N": columns, "stride": columns}, races=True)
    torch.testing.assert_close(out.double(), x.double().softmax(1), rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("target", TARGETS)
def test_change_of_layout(target):
    x = torch.randn(50, 50, generator=torch.Generator().manual_seed(0))
    out = torch.full((50, 50), torch.nan)
    run_case(transpose, target, (1,), {"x": x, "out": out, "N": 50}, races=True)
    assert torch.equal(out, x.T)


def test_atomics():
    """Programs that run side by side add to one address."""
    case = Case(samples.sum_kernel, "sum", {"x": "*fp32", "out": "*fp32", "n": "i32"}, {"BLOCK": 256, "ATOMIC": True})
    x, out = torch.arange(1000, dtype=torch.float32), torch.zeros(1)
    run_case(case, "sm_80", (4,), {"x": x, "out": out, "n": 1000})
    assert out.item() == 499500


def test_batches_of_blocks_agree():
    x = torch.randn(40, 100, generator=torch.Generator().manual_seed(0)).bfloat16()
    outs = [torch.zeros(40, 100) for _ in range(2)]
    for out, lanes in zip(outs, (128, 4096), strict=True):
        run_case(softmax, "sm_90", (40,), {"x": x, "out": out, "N": 100, "stride": 100}, lanes=lanes)
    assert torch.equal(*outs)
