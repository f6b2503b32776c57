"""What info_nce's launchers ask for: builds of their own names, the products of the formula, macro-tiles that fit."""

from __future__ import annotations

import pytest
import torch

from limber_fast.backends.triton import device
from limber_fast.kernels import info_nce_cases
from limber_fast.kernels.info_nce_bwd_launch import WORKSPACE, macro_tiles
from limber_fast.kernels.info_nce_configs import Tiles
from limber_fast.kernels.info_nce_launch import PROGRAMS, STRIPS, strips_and_bands


@pytest.mark.parametrize("target", info_nce_cases.TARGETS)
def test_names_tell_the_builds_apart(target):
    names = [case.name for case, _ in info_nce_cases.cases(target)]
    assert len(names) == len(set(names)) > 100


def test_the_work_of_a_step_is_eight_products():
    """2 N M D forward, 2 to recompute, 4 for the gradients, as the report adds them up; tiles pad nothing here."""
    flops = sum(
        info_nce_cases.work(launch, "bf16").flops
        for launch in info_nce_cases.launches("sm_90", info_nce_cases.OPTIONS[0], "bf16")
    )
    assert flops == 8 * info_nce_cases.N**2 * info_nce_cases.OPTIONS[0].D


@pytest.mark.parametrize("d", [512, 768, 1024])
@pytest.mark.parametrize(("n", "m"), [(130, 130), (3000, 100_000), (32768, 32768)])
def test_macro_tiles_fit_and_fill_the_chip(n, m, d):
    """G and the block of d_image's accumulator within the workspace; at most 5% of the last waves idle, of dS's and of
    the products'."""
    ds, tiles, sms = Tiles(128, 128, 64, 4, 3), Tiles(128, 256, 64, 8, 4), 132
    side, count = macro_tiles(n, m, d, 2, 4, WORKSPACE, 128, ds, tiles, sms)
    assert side % 128 == 0 and side * (2 * side * count + 4 * d) <= WORKSPACE
    assert count == 1 or (count - 1) * side < m
    if n == m == 32768:
        blocks = (side // 128) ** 2 * count
        for items in (blocks, 2 * side // tiles.BLOCK_M * (d // tiles.BLOCK_N)):
            assert items / (-(-items // sms) * sms) > 0.95


@pytest.mark.parametrize("rows", [1, 2, 37, 256, 2048])
def test_strips_and_bands_fit_and_are_even(rows):
    """Partial sums within the workspace; at most 5% of the last strips' programs idle where the rows are many."""
    row = column = 12.0 * 128 * rows
    strip, band = strips_and_bands(rows, rows, STRIPS, row, column)
    assert strip in STRIPS and 0 < band <= rows + strip and (band % strip == 0 or band >= rows)
    assert band * row + -(-band // strip) * column <= max(WORKSPACE, row + column)
    if rows >= 256:
        starts = range(0, rows, band)
        busiest = sum(-(-(-(-min(band, rows - start) // strip) * rows) // PROGRAMS) * strip for start in starts)
        assert strip > 1 and rows * rows / PROGRAMS / busiest > 0.95


@pytest.mark.parametrize("target", info_nce_cases.TARGETS)
def test_steps_are_whole_passes(target):
    """Their products are those of the formula, up to the padding of the last macro-tiles."""
    for (_, launches), d in zip(info_nce_cases.steps(target).items(), info_nce_cases.STEP_D, strict=True):
        flops = sum(work.flops for _, work in launches)
        exact = 8 * info_nce_cases.STEP_N**2 * d
        assert exact <= flops < 1.001 * exact


@pytest.mark.parametrize(
    ("capability", "refused"),
    [((7, 5), "needs compute capability 8.0"), ((8, 0), None), ((9, 0), None), ((10, 0), None), ((10, 3), None),
     ((12, 0), "no tiles for compute capability 12.0")],
)  # fmt: skip
def test_chips_without_tiles_are_refused(monkeypatch, capability, refused):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda where: capability)
    said = device.refusal(torch.device("cuda"), torch.bfloat16)
    assert said is None if refused is None else refused in said
