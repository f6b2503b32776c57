"""Keys and values in int8: what is stored against the tokens, and attention against float64 over what is stored."""

from __future__ import annotations

import itertools

import cases
import pytest
import torch

from limber_fast import PagedBatch, prefix_attention, rotary_table
from limber_fast.cache import PagePool
from limber_fast.reference.prefix_attention import prefix_attention as reference
from limber_fast.reference.prefix_attention import rotate

FORWARD = torch.ops.limber_fast.prefix_attention_fwd.default
HEADS = 2


class Call:
    """A pool in int8 whose unused places hold any integers, with NaN for their scales."""

    def __init__(self, dtype, dims=64, *, page_size=None, rotary=True):
        self.dtype, self.dims = dtype, dims
        self.pool = PagePool(1, HEADS, dims, dtype=torch.int8, budget_bytes=2400 * HEADS * 2 * dims * 2,
                             page_size=page_size)  # fmt: skip
        self.pool.storage.random_(-128, 128, generator=torch.Generator().manual_seed(3))
        self.pool.scales.fill_(torch.nan)
        self.pages, self.scales = self.pool.layer(0), self.pool.layer_scales(0)
        self.rotary = rotary_table(600, dims // 2) if rotary else None

    def rows(self, tokens, seed=19):
        return cases.attention_rows(tokens, HEADS, self.dims, self.dtype, seed=seed)

    def attend(self, engine, rows, batch, **options):
        return prefix_attention(*rows, self.pages, batch, page_scales=self.scales, rotary=self.rotary, **options,
                                backend=engine)  # fmt: skip

    def sequences(self, engine, step=(), prefix=0, members=()):
        """Sequences alone, and forks of one prefix; their cached tokens are written by the op itself."""
        alone, trunk = [self.pool.sequence() for _ in step], self.pool.sequence()
        self.extend(engine, [*alone, trunk], [cached for cached, _ in step] + [prefix])
        forks = [trunk.fork() for _ in members]
        self.extend(engine, forks, [cached for cached, _ in members])
        return alone + forks, [new for _, new in (*step, *members)]

    def extend(self, engine, sequences, tokens):
        batch = self.pool.batch(sequences, tokens)
        self.attend(engine, self.rows(batch.tokens, seed=20), batch)

    def stored(self, batch):
        """K and V of the batch's new tokens as they lie in the pages, [T, H, D] in fp64, and their scales [2, T, H]."""
        sequence = torch.repeat_interleave(torch.arange(len(batch)), batch.queries.diff())
        token = torch.arange(batch.tokens) + (batch.lengths - batch.queries[1:])[sequence]
        page, place = batch.page_table[sequence, token // batch.page_size].long(), token % batch.page_size
        scales = self.scales[page, :, :, place].movedim(2, 0)
        return self.pages[page, :, :, place].movedim(2, 0) * scales[..., None].double(), scales, token

    def true(self, rows, batch, sequences, queries):
        """The reference in fp64 over what is stored; q rotated, and rounded as the op does it."""
        (k, v), _, token = self.stored(batch)
        q = rows[0].double()
        if self.rotary is not None:
            turned = [rotate(x, self.rotary[t].double()) for x, t in zip(q, token, strict=True)]
            q = torch.stack(turned).to(self.dtype).double()
        pages = self.pages.double() * self.scales[..., None].double()
        return reference(q, k, v, pages, queries, [s.length for s in sequences], [s.pages for s in sequences])[0]

    def check(self, engine, **what):
        sequences, queries = self.sequences(engine, **what)
        batch = self.pool.batch(sequences, queries)
        rows = self.rows(batch.tokens)
        before = self.pages.clone(), self.scales.clone()
        found = self.attend(engine, rows, batch)
        assert found.dtype == self.dtype and found.is_contiguous()

        stored, scales, token = self.stored(batch)
        for x, held, scale in zip(rows[1:], stored, scales, strict=True):
            if x is rows[1] and self.rotary is not None:
                x = torch.stack([rotate(k.float(), self.rotary[t]) for k, t in zip(x, token, strict=True)])
                x = x.to(self.dtype)
            largest = x.abs().amax(-1).double()
            torch.testing.assert_close(scale.double(), largest / 127, rtol=1e-5 if self.rotary is not None else 1e-6,
                                       atol=0)  # fmt: skip
            step = 2.0 ** -7 if self.dtype == torch.bfloat16 else 2.0**-10  # of a key rotated in another order
            allowed = 0.5001 * scale.double() + step * largest * (self.rotary is not None)
            assert ((held - x.double()).abs() <= allowed[..., None]).all()
        changed = (self.pages != before[0]).any(-1)
        written = ~self.scales.isnan() & before[1].isnan()
        assert not (changed & ~written).any() and written.sum() == 2 * HEADS * batch.tokens  # none written again
        assert torch.equal(self.scales[~written].nan_to_num(), before[1][~written].nan_to_num())

        true = self.true(rows, batch, sequences, queries)
        eager = prefix_attention(*rows, self.pages.clone(), batch, page_scales=self.scales.clone(), rotary=self.rotary,
                                 backend="eager")  # fmt: skip
        for error, allowed in zip(cases.errors(found, true), cases.errors(eager, true), strict=True):
            assert error <= 2 * allowed + cases.FLOOR[self.dtype], (error, allowed)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("step", cases.STEPS)
def test_sequences_alone(engine, poisoned, step, dtype):
    Call(dtype).check(engine, step=cases.STEPS[step])


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("fork", ["decode", "many decode", "prefill"])
def test_shared_prefixes(engine, poisoned, fork, dtype):
    (prefix,), members = cases.FORKS[fork]
    Call(dtype).check(engine, step=cases.STEPS["mixed"], prefix=prefix, members=members)


@pytest.mark.parametrize("dims, rotary", [(256, True), (48, False), (16, True), (208, True)])
def test_head_dimensions(engine, poisoned, dims, rotary):
    for dtype in (torch.bfloat16, torch.float32):
        call = Call(dtype, dims, rotary=rotary)
        call.check(engine, step=((20, 30), (0, 1)), prefix=70, members=((0, 1), (5, 1), (9, 1), (1, 6)))


@pytest.mark.parametrize("page_size", [1, 5, 8, 64])
def test_page_sizes(engine, poisoned, page_size):
    call = Call(torch.float32, page_size=page_size)
    call.check(engine, step=cases.STEPS["mixed"], prefix=61, members=((0, 1), (5, 1), (9, 1), (1, 6)))


def test_rows_of_zeros_and_ties(engine):
    """A row of zeros gets the scale 0; halves round to even, as torch rounds."""
    call = Call(torch.float32, 16, rotary=False)
    sequence = call.pool.sequence()
    batch = call.pool.batch([sequence], [2])
    k, v = torch.zeros(2, 2, HEADS, 16)
    v[0] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, -127.0, *range(8)])
    call.attend(engine, (torch.ones(2, HEADS, 16), k, v), batch)
    _, scales, _ = call.stored(batch)
    assert torch.equal(scales, torch.tensor([0.0, 0.0, 1.0, 0.0]).view(2, 2, 1).expand(2, 2, HEADS))
    place = call.pages[sequence.pages[0], 0, 1, 0].tolist()
    assert place == [127, 0, 2, 2, 0, -2, -126, -127, *range(8)]


@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-35, 1e30])
def test_sizes_at_the_ends_of_fp32(engine, size):
    call = Call(torch.float32, 16, rotary=False)
    sequence = call.pool.sequence()
    batch = call.pool.batch([sequence], [9])
    q, k, v = call.rows(9)
    call.attend(engine, (q, k, size * v), batch)
    (_, values), scales, _ = call.stored(batch)
    normal = scales[1] > 0
    assert normal.all() if size > 1e-38 else not normal.any()
    wrong = (values - size * v.double()).abs().amax(-1)
    assert (wrong <= torch.where(normal, 0.5001 * scales[1], 1.5e-36).double()).all()


def test_views_of_larger_pools(engine):
    """Pages and scales with strides of their own."""
    found = []
    for apart in (False, True):
        call = Call(torch.float32)
        if apart:
            call.pages = torch.stack([call.pages, call.pages], 1)[:, 1]
            call.scales = torch.stack([call.scales, call.scales, call.scales], 1)[:, 1]
        sequences, queries = call.sequences(engine, step=cases.STEPS["mixed"], prefix=64, members=((3, 1), (0, 1)))
        batch = call.pool.batch(sequences, queries)
        found.append((call.attend(engine, call.rows(batch.tokens), batch), call.pages, call.scales.nan_to_num()))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_fp64_rows_of_eager():
    call = Call(torch.float64)
    sequence = call.pool.sequence()
    batch, rows = call.pool.batch([sequence], [20]), call.rows(20)
    found = call.attend("eager", rows, batch)
    assert found.dtype == torch.float64
    assert max(cases.errors(found, call.true(rows, batch, [sequence], [20]))) < 1e-6


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", ["k", "v", "cached"])
def test_nan_and_inf_reach_those_who_see_them(engine, poisoned, place, value):
    call = Call(torch.float32, rotary=False)
    sequences, queries = call.sequences(engine, step=((30, 1), (0, 20)), prefix=40, members=((0, 1), (17, 1), (8, 30)))
    batch = call.pool.batch(sequences, queries)
    rows = dict(zip("qkv", call.rows(batch.tokens), strict=True))
    sees = torch.zeros(batch.tokens, HEADS, dtype=torch.bool)
    may = sees.clone()
    if place == "cached":  # token 19 of the prefix that three share
        call.scales[sequences[2].pages[1], 1, 0, 3] = torch.nan
        sees[21:, 1] = may[21:, 1] = True
    else:
        rows[place][40, 1, 5] = value
        sees[40:, 1], may[23:, 1] = True, True
    found = call.attend(engine, rows.values(), batch)
    wrong = ~found.isfinite().all(2)
    assert not (sees & ~wrong).any() and not (wrong & ~may).any()


def test_same_bits_on_any_number_of_threads(threads):
    found = []
    for count in (1, 2):
        threads(count)
        call = Call(torch.bfloat16, 64)
        sequences, queries = call.sequences("cpu", step=cases.STEPS["mixed"], prefix=93, members=((3, 1),) * 9)
        batch = call.pool.batch(sequences, queries)
        found.append((call.attend("cpu", call.rows(batch.tokens), batch), call.pages, call.scales.nan_to_num()))
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


BATCH = PagedBatch([2, 1], [2, 9], [[0], [1, 2]])
ROWS = torch.randn(3, 3, HEADS, 64)
PAGES, SCALES = torch.zeros(4, HEADS, 2, 8, 64, dtype=torch.int8), torch.zeros(4, HEADS, 2, 8)


def test_opcheck(engine):
    b = BATCH
    torch.library.opcheck(FORWARD, (
        *ROWS, PAGES.clone(), SCALES.clone(), b.queries, b.lengths, b.page_table, b.order, b.shared, b.private, b.depth,
        None, None, 0.125, engine,
    ))  # fmt: skip


@pytest.mark.parametrize("engine, compiler", [("eager", "aot_eager"), ("cpu", "inductor")])
def test_compile_whole_graph(engine, compiler):
    """Pages and scales are written in place in the compiled graph too."""

    def step(q, k, v, pages, scales):
        out = prefix_attention(q * 1.5, k, v, pages, BATCH, page_scales=scales, backend=engine)
        return out + scales[2].sum() + pages[2].float().sum()

    torch._dynamo.reset()
    results = []
    for function in (torch.compile(step, fullgraph=True, backend=compiler), step):
        pages, scales = PAGES.clone(), SCALES.clone()
        results.append((function(*ROWS, pages, scales), pages, scales))
    for found, true in zip(*results, strict=True):
        torch.testing.assert_close(found, true)


BAD = {
    "no scales": (dict(page_scales=None), ValueError, r"page_scales must be given with int8 pages; got None; PagePool"),
    "scales of other pages": (
        dict(pages=PAGES.float()), TypeError, r"page_scales must be None unless pages are int8; got torch.float32",
    ),
    "scales of other heads": (
        dict(page_scales=SCALES[:, :1]), ValueError,
        r"page_scales must be \[n_pages, H, 2, page size\] with \(2, 2, 8\) after .*; got shape \(4, 1, 2, 8\)",
    ),
    "too few scales": (dict(page_scales=SCALES[:2]), ValueError, r"page_scales must have page 2, which batch names; g"),
    "scales with gaps": (
        dict(page_scales=torch.zeros(4, HEADS, 2, 16)[..., :8]), ValueError, r"page_scales must have contiguous pages",
    ),
    "scales in bf16": (dict(page_scales=SCALES.bfloat16()), TypeError, r"page_scales must be fp32; got torch.bfloat16"),
    "scales of a list": (dict(page_scales=[1.0]), TypeError, r"page_scales must be a tensor \[n_pages, H, 2, page siz"),
}  # fmt: skip


@pytest.mark.parametrize("change, kind, message", BAD.values(), ids=BAD)
def test_bad_input(change, kind, message):
    call = {"pages": PAGES, "page_scales": SCALES} | change
    with pytest.raises(kind, match="^prefix_attention: " + message):
        prefix_attention(*ROWS, batch=BATCH, **call)


def test_a_fork_copies_scales_with_its_page():
    call = Call(torch.float32)
    trunk = call.pool.sequence()
    call.extend("cpu", [trunk], [21])
    fork = trunk.fork()
    call.extend("cpu", [fork], [2])
    assert fork.pages[0] == trunk.pages[0] and fork.pages[1] != trunk.pages[1]
    for x in (call.pages, call.scales):
        assert torch.equal(x[fork.pages[1], :, :, :5], x[trunk.pages[1], :, :, :5])


def test_bytes_of_a_page():
    pool = PagePool(3, 16, 256, dtype=torch.int8, budget_bytes=1 << 22)
    assert pool.page_bytes == 3 * 16 * 2 * 16 * (256 + 4)
    held = sum(x.nbytes for x in (pool.storage, pool.scales))
    assert held == pool.n_pages * pool.page_bytes <= 1 << 22
    assert pool.page_bytes / PagePool.bytes_of_page(3, 16, 256, torch.bfloat16, 16) < 0.51


def test_tokens_are_the_same_in_any_chunks(engine):
    """Written once: attention reads what is stored, also of the tokens of its own call."""
    found = []
    for chunks in ([48], [7, 1, 20, 20]):  # whole pages
        call = Call(torch.float32)
        sequence, rows = call.pool.sequence(), call.rows(48)
        parts = []
        for begin, end in itertools.pairwise(itertools.accumulate(chunks, initial=0)):
            batch = call.pool.batch([sequence], [end - begin])
            parts.append(call.attend(engine, [x[begin:end] for x in rows], batch))
        found.append((torch.cat(parts), call.pages[sequence.pages], call.scales[sequence.pages].nan_to_num()))
    assert torch.equal(found[0][1], found[1][1]) and torch.equal(found[0][2], found[1][2])
    torch.testing.assert_close(found[0][0], found[1][0])
