"""The Triton kernels of prefix_attention behind the public op: interpreted, as executed PTX and on a GPU.

Held against float64, by the calls of the CPU kernels' tests.
"""

from __future__ import annotations

import cases
import pytest
import torch
from ops.test_prefix_attention_int8 import Call as Int8Call
from ops.test_prefix_attention_values import GROUPS, Call

from gpu.launching import ENGINES, on_engines, running, send_to_triton
from gpu.test_prefix_attention_emulated import LONG
from limber_fast import PagedBatch, prefix_attention
from limber_fast.kernels import prefix_attention_launch as launch
from limber_fast.kernels.recording import recording
from limber_fast.reference.prefix_attention import prefix_attention as reference


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, poisoned: None) -> str:
    """CPU tensors go to the Triton backend, whose launches run on the engine; its outputs are NaN beforehand."""
    send_to_triton(monkeypatch, "prefix_attention", request.param)
    return request.param


def _move(batch, device):
    for name, x in vars(batch).items():
        if isinstance(x, torch.Tensor):
            setattr(batch, name, x.to(device))


class OnEngine(Call):
    """A step whose attention the Triton kernels compute."""

    def attend(self, engine, q, k, v, pages, batch, **options):
        if engine != "cuda":
            with running(engine):
                return prefix_attention(q, k, v, pages, batch, **options, backend="triton")
        there = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
        _move(batch, "cuda")
        held = pages.cuda()
        out = prefix_attention(q.cuda(), k.cuda(), v.cuda(), held, batch, **there, backend="triton").cpu()
        pages.copy_(held)
        return out


def steps() -> dict[str, tuple]:
    """Calls by name: dtype, heads, dimensions, options of the call, the method that makes its sequences, scale."""
    half, full, brain, decode = torch.float16, torch.float32, torch.bfloat16, ("forked", *cases.FORKS["decode"])
    return {
        "many_rows_of_forks": (brain, 1, 64, {}, ("forked", (16, 48), ((0, 90), (5, 70), (9, 120), (2, 1))), None),
        "all_turned": (half, 1, 32, {"rotary_dims": 32}, ("forked", (16, 48), ((0, 9), (5, 0), (2, 300))), None),
        "one_row": (brain, 1, 16, {"rotary_dims": 0}, ("alone", ((40, 1),)), None),
        "mixed": (brain, 2, 64, {}, ("alone", cases.STEPS["mixed"]), None),
        "mixed_fp16": (half, 2, 48, {}, ("alone", cases.STEPS["mixed"]), None),
        "mixed_fp32": (full, 2, 64, {}, ("alone", cases.STEPS["mixed"]), None),
        "chunks": (half, 1, 64, {"page_size": 5}, ("alone", cases.STEPS["chunks"]), None),
        "many_rows": (brain, 1, 64, {}, ("alone", cases.STEPS["many rows"]), None),
        "decode": (brain, 2, 64, {}, decode, None),
        "many_decode": (half, 1, 64, {}, ("forked", *cases.FORKS["many decode"]), None),
        "many_decode_fp32": (full, 1, 48, {"rotary_dims": 6}, ("forked", *cases.FORKS["many decode"]), None),
        "prefill": (brain, 2, 64, {"shuffled": True}, ("forked", *cases.FORKS["prefill"]), None),
        "groups": (half, 1, 64, {}, ("groups", *GROUPS), None),
        "nested": (brain, 3, 256, {"rotary_dims": 64}, ("forked", *cases.FORKS["nested"]), 0.2),
        "nested_fp32": (full, 2, 16, {"rotary_dims": 0, "page_size": 1}, ("forked", *cases.FORKS["nested"]), None),
        "sharp": (full, 2, 64, {"sharp": 50.0, "rotary_dims": 0}, decode, None),
        "large_logits": (full, 2, 64, {"sharp": 0.5, "offset": 300.0, "rotary_dims": 0}, decode, None),
        **{name: (brain, 1, 64, {}, ("forked", *fork), None) for name, fork in LONG.items()},
    }


class Int8OnEngine(Int8Call):
    """The same over pages in int8. What was cached before is written by eager PyTorch."""

    def extend(self, engine, sequences, tokens):
        super().extend("eager", sequences, tokens)

    def attend(self, engine, rows, batch, **options):
        if engine == "eager":
            return super().attend(engine, rows, batch, **options)
        options |= {"rotary": self.rotary, "backend": "triton"}
        if engine != "cuda":
            with running(engine):
                return prefix_attention(*rows, self.pages, batch, page_scales=self.scales, **options)
        pages, scales, *rows = (x.cuda() for x in (self.pages, self.scales, *rows))
        options["rotary"] = None if self.rotary is None else self.rotary.cuda()
        _move(batch, "cuda")
        out = prefix_attention(*rows, pages, batch, page_scales=scales, **options).cpu()
        _move(batch, "cpu")
        self.pages.copy_(pages), self.scales.copy_(scales)
        return out


INT8_STEPS = {
    "mixed": (torch.bfloat16, 64, True, {"step": cases.STEPS["mixed"]}),
    "mixed_fp16": (torch.float16, 48, False, {"step": cases.STEPS["mixed"]}),
    "chunks": (torch.bfloat16, 64, True, {"step": cases.STEPS["chunks"]}),
    "decode": (torch.bfloat16, 256, True, {"prefix": 40, "members": cases.FORKS["decode"][1]}),
    "prefill": (torch.float16, 64, True, {"prefix": 61, "members": cases.FORKS["prefill"][1]}),
    "many_decode": (torch.float16, 16, False, {"prefix": 93, "members": cases.FORKS["many decode"][1]}),
    "long": (torch.bfloat16, 64, True, {"prefix": 520, "members": ((0, 1), (70, 1), (7, 20))}),
}


@on_engines("name", INT8_STEPS, kept=("decode",))
def test_int8_against_float64(engine, name):
    dtype, dims, rotary, step = INT8_STEPS[name]
    Int8OnEngine(dtype, dims, rotary=rotary).check(engine, **step)


def test_int8_rows_do_not_feel_what_they_do_not_see(monkeypatch, poisoned):
    """A later value of 60,000 leaves earlier rows their digits, in fp16 too; NaN reaches those who see it."""
    send_to_triton(monkeypatch, "prefix_attention", "interpreted")
    found = []
    for last in (None, 6e4, torch.nan):
        call = Int8OnEngine(torch.float16, 64, rotary=False)
        sequence = call.pool.sequence()
        batch, (q, k, v) = call.pool.batch([sequence], [20]), call.rows(20)
        v = 0.1 * v
        if last is not None:
            v[19] = last
        found.append(call.attend("interpreted", (q, k, v), batch))
    alone, beside, nan = found
    assert max(cases.errors(beside[:19], alone[:19].double())) <= 2 * cases.FLOOR[torch.float16]
    assert nan[19].isnan().all()


STEPS = steps()
KEPT = ("mixed", "nested", "nested_fp32", "prefill")


@on_engines("name", STEPS, kept=KEPT)
def test_against_float64(engine, name):
    dtype, heads, dims, options, (kind, *step), scale = STEPS[name]
    call = OnEngine(dtype, heads, dims, **options)
    order = [cases.permutation(len(step[-1]))] if kind == "forked" else []
    sequences = getattr(call, kind)(*step, *order)
    sharp, offset = options.get("sharp", 0.0), options.get("offset", 0.0)
    rounded = 2**-23 * 64**-0.5 * (offset**2 + 64 * 6 * sharp)  # fp32 rounds the logits, in any order of the sum
    call.check(engine, *sequences, scale=scale, more=rounded)


def test_positions_views_and_tables_wider_than_needed(engine):
    """Rotary positions other than the places; q, k and v as views of one product, NaN between them."""
    call = OnEngine(torch.float32, 2, 32)
    sequences, queries = call.alone(((5, 3), (0, 2)))
    positions = [7, 501, 3, 0, 9]
    call.pool.batch(sequences, queries)  # room for them
    tables = [[*s.pages, 0, 0, 0] for s in sequences]
    batch = PagedBatch([*queries, 0], [*(s.length for s in sequences), 0], [*tables, []], positions=positions)
    product = torch.full((batch.tokens, 4, 2, 32), torch.nan)
    q, k, v = (product[:, i].copy_(x) for i, x in enumerate(call.rows(batch.tokens)))
    pages = call.pool.layer(0)
    true, true_pages = reference(
        *(x.double() for x in (q, k, v, pages)), [*queries, 0], [*(s.length for s in sequences), 0], [*tables, []],
        positions=positions, rotary=call.rotary.double(),
    )  # fmt: skip
    found = call.attend(engine, q, k, v, pages, batch, rotary=call.rotary)
    for x, y in ((found, true), (pages.nan_to_num(), true_pages.nan_to_num())):
        assert max(cases.errors(x, y)) < 4 * cases.FLOOR[torch.float32]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", ["q", "k", "v", "cached k", "cached v"])
def test_nan_and_inf_reach_those_who_see_them(monkeypatch, poisoned, place, value):
    send_to_triton(monkeypatch, "prefix_attention", "interpreted")
    OnEngine(torch.float32, 2, 16, rotary_dims=0).check_who_sees("interpreted", place, value)


def test_nothing_new(engine):
    for batch, n in ((PagedBatch([0, 0], [5, 0], [[3], []]), 4), (PagedBatch([], [], []), 1)):
        rows, pages = torch.empty(3, 0, 2, 64).half(), torch.zeros(n, 2, 2, 8, 64).half()
        call = OnEngine(torch.float16, 2, 64, rotary_dims=0)
        assert call.attend(engine, *rows, pages, batch).shape == (0, 2, 64)


def test_parts_do_not_multiply_with_the_groups():
    """As many slots as a row can have parts, however many groups there are."""
    groups, page = 70, 8
    tables = [[group, groups + 2 * group + member] for group in range(groups) for member in range(2)]
    batch = PagedBatch([1] * len(tables), [page + 3] * len(tables), tables)
    assert len(batch.shared) == groups and batch.depth == 1
    rows = torch.empty(3, batch.tokens, 1, 16, dtype=torch.bfloat16)
    with recording() as found:
        launch.prefix_attention_fwd(
            *rows, torch.empty(3 * groups, 1, 2, page, 16, dtype=torch.bfloat16), None, batch.queries, batch.lengths,
            batch.page_table, batch.order, batch.shared, batch.private, batch.depth, None, None,
            torch.empty_like(rows[0]), scale=1.0, precision="ieee",
        )  # fmt: skip
    assert [one.arguments["slots"] for one in found if "slots" in one.arguments] == [2, 2, 2]


def test_grids_of_many_sequences_and_long_tables():
    """Axes beyond the first hold at most 65535 programs."""
    n, width = 70_000, 8192
    q, counts = torch.empty(n, 1, 16, dtype=torch.bfloat16), torch.zeros(n, dtype=torch.int32)
    table = torch.zeros(1, width, dtype=torch.int32).expand(n, width)
    shared = torch.zeros(2, 5, dtype=torch.int32)
    with recording() as found:
        launch.prefix_attention_fwd(
            q, q, q, torch.empty(1, 1, 2, 8, 16, dtype=torch.bfloat16), None, torch.arange(n + 1, dtype=torch.int32),
            counts, table, counts, shared, counts, 2, None, None, torch.empty_like(q), scale=1.0, precision="ieee",
        )  # fmt: skip
    assert len(found) == 5 and all(max((*one.grid[1:], 1)) < 65536 and one.grid[0] < 2**31 for one in found)
