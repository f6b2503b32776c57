"""More columns than packed panels may hold: the kernels go by super-blocks of them, with sums parked between two."""

from __future__ import annotations

from functools import cache

import cases
import pytest
import torch
from torch import Tensor

from limber_fast import info_nce, native
from limber_fast.reference.info_nce import info_nce as reference

# At D = 2048 a super-block is 4,096 to 6,144 columns.
ROWS = {"image": (40, 2048), "text": (40, 2048), "extra_negatives": (6600, 2048)}
# From 4,096 rows on, at such a D, blocks are narrower where no tile is cached.
TALL = {"image": (4099, 264), "text": (4099, 264)}
# Towers whose fp32 sums, N D > 64 Mi, are too large to park: a pass for each.
LARGE = {"image": (257, 1 << 18), "text": (257, 1 << 18)}
# Relative error of a gradient's largest entry: its own rounding, and that of dS where it is multiplied in 16 bits.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def _leaves(shapes: dict[str, tuple[int, int]], dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: (torch.randn(shape, generator=generator) / shape[1] ** 0.5).to(dtype)
            for name, shape in shapes.items()}  # fmt: skip


def _gradients(function, leaves, wanted, **options) -> dict[str, Tensor]:
    leaves = {name: x.detach().clone().requires_grad_(name in wanted) for name, x in leaves.items()}
    loss = function(**leaves, logit_scale=12.0, reduction="sum", **options)
    loss = loss[0] if isinstance(loss, tuple) else loss
    return {"loss": loss.detach()} | dict(
        zip(wanted, torch.autograd.grad(loss, [leaves[x] for x in wanted]), strict=True)
    )


@cache
def _truth(dtype: torch.dtype, normalize: bool) -> dict[str, Tensor]:
    leaves = {name: x.double() for name, x in _leaves(ROWS, dtype).items()}
    return _gradients(reference, leaves, tuple(leaves), normalize=normalize)


def _check(found: dict[str, Tensor], true: dict[str, Tensor], dtype: torch.dtype) -> None:
    for name, x in found.items():
        # Where rows are multiplied in bf16 the normalised ones are rounded to it first.
        tolerance = TOLERANCE[dtype] if name != "loss" else 2e-6 if dtype == torch.float32 else 2e-5
        assert max(cases.errors(x, true[name])) < tolerance, name


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("wanted", [tuple(ROWS), ("image",), ("text", "extra_negatives")])
def test_columns_beyond_one_super_block(own_kernels, poisoned, wanted, normalize, dtype):
    options = {"normalize": normalize, "cache_mb": 0, "backend": own_kernels}
    _check(_gradients(info_nce, _leaves(ROWS, dtype), wanted, **options), _truth(dtype, normalize), dtype)


@pytest.mark.skipif(not native.available_isas(), reason="no native module was built")
def test_tall_towers_without_a_cache(poisoned):
    leaves = _leaves(TALL, torch.float32)
    true = _gradients(reference, {name: x.double() for name, x in leaves.items()}, tuple(TALL))
    _check(_gradients(info_nce, leaves, tuple(TALL), cache_mb=0, backend="cpu"), true, torch.float32)


@pytest.mark.skipif(not native.available_isas(), reason="no native module was built")
def test_sums_too_large_to_park_take_a_pass_for_each_tower():
    """On the best instruction set alone: the yardstick takes seconds."""
    leaves = _leaves(LARGE, torch.float16)
    found = _gradients(info_nce, leaves, tuple(LARGE), cache_mb=0, backend="cpu")
    true = _gradients(reference, {name: x.double() for name, x in leaves.items()}, tuple(LARGE))
    _check(found, true, torch.float16)
