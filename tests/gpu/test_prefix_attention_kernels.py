"""The Triton kernels of prefix_attention behind the public op: interpreted, as executed PTX and on a GPU.

Held against float64, by the calls of the CPU kernels' tests.
"""

from __future__ import annotations

import cases
import pytest
import torch
from ops.test_prefix_attention_values import Call

from gpu.launching import ENGINES, on_engines, running, send_to_triton
from gpu.test_prefix_attention_emulated import LONG
from limber_fast import PagedBatch, prefix_attention
from limber_fast.kernels import prefix_attention_launch as launch
from limber_fast.reference.prefix_attention import prefix_attention as reference


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, poisoned: None) -> str:
    """CPU tensors go to the Triton backend, whose launches run on the engine; its outputs are NaN beforehand."""
    send_to_triton(monkeypatch, "prefix_attention", request.param)
    return request.param


class OnEngine(Call):
    """A step whose attention the Triton kernels compute."""

    def attend(self, engine, q, k, v, pages, batch, **options):
        if engine != "cuda":
            with running(engine):
                return prefix_attention(q, k, v, pages, batch, **options, backend="triton")
        there = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
        for name, x in vars(batch).items():
            if isinstance(x, torch.Tensor):
                setattr(batch, name, x.cuda())
        held = pages.cuda()
        out = prefix_attention(q.cuda(), k.cuda(), v.cuda(), held, batch, **there, backend="triton").cpu()
        pages.copy_(held)
        return out


def steps() -> dict[str, tuple]:
    """Calls by name: dtype, heads, dimensions, options of the call, what to make of it, scale."""
    half, full, brain = torch.float16, torch.float32, torch.bfloat16
    return {
        "mixed": (brain, 2, 64, {}, ("alone", "mixed"), None),
        "mixed_fp16": (half, 2, 48, {}, ("alone", "mixed"), None),
        "mixed_fp32": (full, 2, 64, {}, ("alone", "mixed"), None),
        "chunks": (half, 1, 64, {"page_size": 5}, ("alone", "chunks"), None),
        "many_rows": (brain, 1, 64, {}, ("alone", "many rows"), None),
        "decode": (brain, 2, 64, {}, ("forked", "decode"), None),
        "many_decode": (half, 1, 64, {}, ("forked", "many decode"), None),
        "many_decode_fp32": (full, 1, 40, {"rotary_dims": 6}, ("forked", "many decode"), None),
        "prefill": (brain, 2, 64, {"shuffled": True}, ("forked", "prefill"), None),
        "nested": (brain, 3, 256, {"rotary_dims": 64}, ("forked", "nested"), 0.2),
        "nested_fp32": (full, 2, 16, {"rotary_dims": 0, "page_size": 1}, ("forked", "nested"), None),
        "sharp": (full, 2, 64, {"sharp": 50.0, "rotary_dims": 0}, ("forked", "decode"), None),
        "large_logits": (full, 2, 64, {"sharp": 0.5, "offset": 300.0, "rotary_dims": 0}, ("forked", "decode"), None),
        **{name: (brain, 1, 64, {}, ("long", name), None) for name in LONG},
    }


STEPS = steps()
KEPT = ("mixed", "nested", "nested_fp32", "prefill")


@on_engines("name", STEPS, kept=KEPT)
def test_against_float64(engine, name):
    dtype, heads, dims, options, (kind, which), scale = STEPS[name]
    call = OnEngine(dtype, heads, dims, **options)
    if kind == "alone":
        sequences = call.alone(cases.STEPS[which])
    else:
        prefixes, members = cases.FORKS[which] if kind == "forked" else LONG[which]
        sequences = call.forked(prefixes, members, cases.permutation(len(members)))
    sharp, offset = options.get("sharp", 0.0), options.get("offset", 0.0)
    rounded = 2**-23 * 64**-0.5 * (offset**2 + 64 * 6 * sharp)  # fp32 rounds the logits, in any order of the sum
    call.check(engine, *sequences, scale=scale, more=rounded)


def test_positions(engine):
    """Rotary positions other than the places."""
    call = OnEngine(torch.float32, 2, 32)
    sequences, queries = call.alone(((5, 3), (0, 2)))
    batch = call.pool.batch(sequences, queries, positions=[7, 501, 3, 0, 9])
    arguments = (*call.rows(batch.tokens), call.pool.layer(0).clone())
    expected = prefix_attention(*arguments, batch, rotary=call.rotary, backend="eager")
    pages = call.pool.layer(0)
    found = call.attend(engine, *arguments[:3], pages, batch, rotary=call.rotary)
    assert max(cases.errors(found, expected.double())) < cases.FLOOR[torch.float32] * 4
    torch.testing.assert_close(pages, arguments[3], equal_nan=True, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", ["q", "k", "v", "cached k"])
def test_nan_and_inf_reach_those_who_see_them(monkeypatch, poisoned, place, value):
    """And nobody in another sequence or head."""
    send_to_triton(monkeypatch, "prefix_attention", "interpreted")
    call = OnEngine(torch.float32, 2, 16, rotary_dims=0)
    sequences, queries = call.forked((40,), ((0, 1), (3, 1), (17, 1), (8, 30)))
    other, more = call.alone(((30, 1), (0, 20)))
    sequences, queries = sequences + other, queries + more
    batch, pages = call.pool.batch(sequences, queries), call.pool.layer(0)
    rows = dict(zip("qkv", call.rows(batch.tokens), strict=True))
    may = torch.zeros(batch.tokens, 2, dtype=torch.bool)
    if place in rows:
        rows[place][20, 1, 5] = value
        may[20 if place == "q" else slice(3, 33), 1] = True
    else:
        pages[sequences[0].pages[2], 1, 0, 3, 5] = value
        may[:33, 1] = True
    true, _ = reference(*(x.double() for x in rows.values()), pages.double(), queries, [s.length for s in sequences],
                        [s.pages for s in sequences])  # fmt: skip
    found = call.attend("interpreted", *rows.values(), pages, batch)
    wrong, sees = (~x.isfinite().all(2) for x in (found, true))
    assert sees.any() and not (sees & ~wrong).any() and not (wrong & ~may).any()


def test_nothing_new(engine):
    for batch, n in ((PagedBatch([0, 0], [5, 0], [[3], []]), 4), (PagedBatch([], [], []), 1)):
        rows, pages = torch.empty(3, 0, 2, 64).half(), torch.zeros(n, 2, 2, 8, 64).half()
        call = OnEngine(torch.float16, 2, 64, rotary_dims=0)
        assert call.attend(engine, *rows, pages, batch).shape == (0, 2, 64)


def test_tiles_fit_what_the_rows_are():
    for rows, sequences, dtype, wide in ((1, 1, torch.bfloat16, 16), (2048, 1, torch.bfloat16, 64),
                                         (64, 64, torch.float16, 16), (2048, 1, torch.float32, 16)):  # fmt: skip
        assert launch.tiles(rows, sequences, dtype, 256)["BLOCK_M"] == wide
