"""Compiled matrix products, executed from their PTX, against float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from gpu import samples
from gpu.ptx.launch import run_case
from gpu.ptx_sources import TILE, matmul_problem, relative_error

ERROR = {torch.bfloat16: 2e-3, torch.float16: 3e-4, torch.float32: 1e-3}
NAMES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_product(target, dtype):
    case = samples.matmul(num_warps=4, **TILE)
    case = dataclasses.replace(case, signature={**case.signature, **dict.fromkeys("abc", NAMES[dtype])})
    arguments, exact = matmul_problem(200, 136, 112, dtype)
    counts = run_case(case, target, (4, 3), arguments)
    assert relative_error(arguments["c"], exact) < ERROR[dtype]
    assert counts["mma" if target == "sm_80" else "wgmma"] > 0


def test_race_check_passes_a_sound_kernel():
    arguments, exact = matmul_problem(72, 72, 80, torch.bfloat16)
    run_case(samples.matmul(num_warps=4, **TILE), "sm_80", (2, 2), arguments, races=True)
    assert relative_error(arguments["c"], exact) < ERROR[torch.bfloat16]


@pytest.mark.parametrize("races", [False, True])
@pytest.mark.parametrize("on_host", [True, False])
def test_product_by_descriptors(on_host, races):
    """Ragged sizes; bulk copies fill what lies outside with zeros and leave it out when they write."""
    arguments, exact = matmul_problem(200, 136, 160, torch.bfloat16)
    result = arguments["c"]
    if on_host:
        boxes = {"a": [128, 64], "b": [128, 64], "c": [128, 128]}
        arguments |= {name: TensorDescriptor.from_tensor(arguments[name], box) for name, box in boxes.items()}
    counts = run_case(samples.descriptor_matmul(on_host=on_host), "sm_90", (2, 2), arguments, races=races)
    assert relative_error(result, exact) < ERROR[torch.bfloat16]
    assert counts["wgmma"] > 0 and counts["mbarrier"] > 0
