"""csrc/cuda/prefix_attention.cu over int8 pages on the host emulation: what it stores, bit by bit, and attention over
that against float64."""

from __future__ import annotations

import cases
import pytest
import torch
from ops.test_prefix_attention_int8 import HEADS, Call

from gpu.nvcc import emulated, needs_nvcc
from gpu.test_prefix_attention_emulated import DTYPES, mode  # noqa: F401
from limber_fast import prefix_attention
from limber_fast.reference.prefix_attention import prefix_attention as reference

pytestmark = [needs_nvcc, pytest.mark.usefixtures("poisoned")]


class Int8Call(Call):
    """What was cached before is written by eager PyTorch: only the step itself is emulated."""

    def extend(self, engine, sequences, tokens):
        super().extend("eager", sequences, tokens)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("step", cases.STEPS)
def test_sequences_alone(mode, step, dtype):  # noqa: F811
    Int8Call(dtype).check("cuda", step=cases.STEPS[step])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fork", ["decode", "many decode", "prefill"])
def test_shared_prefixes(mode, fork, dtype):  # noqa: F811
    (prefix,), members = cases.FORKS[fork]
    Int8Call(dtype).check("cuda", step=cases.STEPS["mixed"], prefix=prefix, members=members)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims, rotary", [(128, True), (256, True), (256, False)])
def test_head_dimensions(mode, dims, rotary, dtype):  # noqa: F811
    call = Int8Call(dtype, dims, rotary=rotary)
    call.check("cuda", step=((20, 30), (0, 1)), prefix=70, members=((0, 1), (5, 1), (9, 1), (1, 6)))


@pytest.mark.parametrize("page_size", [1, 8, 64])
def test_page_sizes(mode, page_size):  # noqa: F811
    call = Int8Call(torch.float16, page_size=page_size)
    call.check("cuda", step=cases.STEPS["mixed"], prefix=61, members=((0, 1), (5, 1), (9, 1), (1, 6)))


# Over the places where splits begin, 256 and 512; more rows than a tile.
LONG = {
    "prefix over two splits": dict(prefix=300, members=tuple((i % 5, 1) for i in range(35))),
    "private over two": dict(step=((500, 1), (255, 3)), prefix=40, members=((260, 1), (215, 15), (216, 3))),
    "prefill beside decode": dict(prefix=270, members=((0, 1), (9, 50), (2, 15), (2, 16))),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("what", LONG)
def test_splits(mode, what, dtype):  # noqa: F811
    Int8Call(dtype).check("cuda", **LONG[what])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [64, 128, 256])
def test_stored_bits_are_those_of_eager(dims, dtype):
    """Integers and scales; of zeros, ties, the smallest numbers and the largest, and of rows that are not finite."""
    x = cases.attention_rows(16, HEADS, dims, torch.float32, seed=5)[0]
    x *= torch.logspace(-44, 38, 16)[:, None, None]
    x[3], x[4, :, ::2], x[5] = 0, 0, torch.arange(dims) % 9 - 4.5
    x[6, 1, 7], x[7, 0, dims - 1], x[8, 1, 0] = torch.nan, torch.inf, -torch.inf
    x[9] = torch.arange(dims).sub(dims / 2).div(2)  # ties: halves over the scale 1
    x[9, :, 0] = 127
    x[10:13] = x[10:13].sign() * torch.tensor([127 * 2.0**-126, 126.5 * 2.0**-126, 2.0**-133])[:, None, None]
    made = []
    for engine in ("cuda", "eager"):
        call = Call(dtype, dims, rotary=False)
        batch = call.pool.batch([call.pool.sequence()], [16])
        with emulated(2):
            call.attend(engine, (torch.zeros_like(x).to(dtype), x.to(dtype), x.flip(0).to(dtype)), batch)
        made.append((call.pages, call.scales.view(torch.int32)))
    nan = made[1][1].view(torch.float32).isnan()
    assert torch.equal(made[0][0], made[1][0]) and torch.equal(made[0][1][~nan], made[1][1][~nan])
    assert torch.equal(made[0][1].view(torch.float32).isnan(), nan) and nan[:1].any() and not nan[:1].all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("direction", [1, -1])
def test_sizes_from_2_to_minus_13_up_to_13(mode, dtype, direction):  # noqa: F811
    """Growing or shrinking from tile to tile: every row keeps its digits, against the sum of weighted magnitudes."""
    tokens = 80
    call = Call(dtype, rotary=False)
    sequence = call.pool.sequence()
    batch, (q, k, v) = call.pool.batch([sequence], [tokens]), call.rows(tokens)
    v = (v.float() * torch.logspace(-13 * direction, 13 * direction, tokens, base=2)[:, None, None]).to(dtype)
    found = call.attend("cuda", (q, k, v), batch)
    (keys, values), _, _ = call.stored(batch)
    empty = torch.zeros(call.pages.shape, dtype=torch.float64)
    arguments = (empty, [tokens], [tokens], [sequence.pages])
    true, _ = reference(q.double(), keys, values, *arguments)
    size, _ = reference(q.double(), keys, values.abs(), *arguments)
    # A weight is rounded, and the result, perhaps to a subnormal number.
    subnormal = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert ((found.double() - true).abs() <= 2.05 * cases.FLOOR[dtype] * size + subnormal).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", ["k", "v", "cached k", "cached v"])
def test_nan_and_inf_reach_those_who_see_them(mode, place, value):  # noqa: F811
    """And nobody in another sequence or head."""
    call = Int8Call(torch.bfloat16, rotary=False)
    sequences, queries = call.sequences("cuda", step=((30, 1), (0, 20)), prefix=40, members=((0, 1), (17, 1), (8, 30)))
    batch = call.pool.batch(sequences, queries)
    rows = dict(zip("qkv", call.rows(batch.tokens), strict=True))
    sees = torch.zeros(batch.tokens, HEADS, dtype=torch.bool)
    may = sees.clone()
    if place in rows:
        rows[place][40, 1, 5] = value
        sees[40:, 1], may[23:, 1] = True, True
    else:  # token 19 of the prefix that three share
        call.scales[sequences[2].pages[1], 1, "kv".index(place[-1]), 3] = torch.nan
        sees[21:, 1] = may[21:, 1] = True
    wrong = ~call.attend("cuda", rows.values(), batch).isfinite().all(2)
    assert not (sees & ~wrong).any() and not (wrong & ~may).any()


def test_the_same_bits_in_any_order():
    found = []
    for seed, eager in ((0, False), (5, False), (7, True)):
        call = Int8Call(torch.bfloat16)
        batch = call.pool.batch(*call.sequences("cuda", **LONG["private over two"]))
        with emulated(seed, eager):
            found.append((call.attend("cuda", call.rows(batch.tokens), batch), call.pages.clone()))
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


def test_views_of_larger_pools():
    """Pages and scales with strides of their own."""
    found = []
    for apart in (False, True):
        call = Int8Call(torch.float16)
        if apart:
            call.pages = torch.stack([call.pages, call.pages], 1)[:, 1]
            call.scales = torch.stack([call.scales, call.scales, call.scales], 1)[:, 1]
        batch = call.pool.batch(*call.sequences("cuda", step=cases.STEPS["mixed"], prefix=64, members=((3, 1), (0, 1))))
        with emulated():
            out = prefix_attention(*call.rows(batch.tokens), call.pages, batch, page_scales=call.scales, backend="cuda")
        found.append((out, call.pages, call.scales.nan_to_num()))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
