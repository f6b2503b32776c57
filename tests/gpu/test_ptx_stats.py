"""Coalescing and bank conflicts on patterns whose counts are known."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from gpu import samples
from gpu.ptx.launch import run_case
from gpu.ptx.stats import Recorder
from gpu.ptx_sources import TILE, matmul_problem, run_by_hand


@pytest.mark.parametrize(
    ("stride", "sectors", "least"), [(4, 4, 4), (8, 8, 4), (32, 32, 4), (0, 1, 1)], ids=["unit", "two", "far", "same"]
)
def test_sectors(stride, sectors, least):
    recorder = Recorder()
    body = f"mul.wide.u32 %d1, %r0, {stride};\nadd.s64 %d2, %d0, %d1;\nld.global.b32 %r1, [%d2];"
    aligned = torch.zeros(512)[8:]
    aligned = aligned[-aligned.data_ptr() % 32 // 4 :]
    run_by_hand(body, [aligned], recorder=recorder)
    found = recorder.total("global")
    assert (found.requests, found.units, found.least_units) == (1, sectors, least)


@pytest.mark.parametrize(
    ("stride", "width", "passes", "least"),
    [
        (4, "b32", 1, 1),
        (8, "b32", 2, 1),
        (128, "b32", 32, 1),
        (0, "b32", 1, 1),
        (16, "v4.b32", 4, 4),
        (32, "v4.b32", 8, 4),
    ],
)
def test_bank_conflicts(stride, width, passes, least):
    recorder = Recorder()
    values = "{%r0, %r0, %r0, %r0}" if width[0] == "v" else "%r0"
    body = f"mov.u32 %r1, tile;\nmad.lo.s32 %r2, %r0, {stride}, %r1;\nst.shared.{width} [%r2], {values};"
    run_by_hand(body, [], shared=4096, recorder=recorder)
    found = recorder.total("shared")
    assert (found.requests, found.units, found.least_units) == (1, passes, least)
    assert found.conflicts == passes - least and found.efficiency == least / passes


@pytest.mark.parametrize("known", [True, False])
def test_compiled_product(known):
    """Triton swizzles its tiles: what ldmatrix reads lies in different banks. Where it is not told that N is a multiple
    of 16, every element is stored by itself: 16 sectors per request instead of 4."""
    case = samples.matmul(num_warps=4, **TILE)
    if known:
        case = dataclasses.replace(case, divisible=(*case.divisible, "N"))
    recorder = Recorder()
    arguments, _ = matmul_problem(128, 128, 128, torch.bfloat16)
    run_case(case, "sm_80", (2, 2), arguments, recorder=recorder)
    matrices = [traffic for (_, text), traffic in recorder.traffic.items() if text.startswith("ldmatrix")]
    assert matrices and not any(traffic.conflicts for traffic in matrices)
    assert (recorder.total("global").efficiency == 1) == known
    text, worst = recorder.worst("global", 1)[0]
    assert known or ("st.global.b16" in text and worst.sectors_per_request == 16)
