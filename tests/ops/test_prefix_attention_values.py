"""out and pages against float64: at most twice the error of eager PyTorch in the same dtype."""

from __future__ import annotations

import cases
import pytest
import torch
import torch.nn.functional as F

from limber_fast import PagedBatch, prefix_attention, rotary_table
from limber_fast.cache import PagePool
from limber_fast.reference.prefix_attention import prefix_attention as reference


class Call:
    """A step as `STEPS` and `FORKS` describe it, over a pool whose unused places are NaN."""

    def __init__(self, dtype, heads, dims, *, page_size=8, rotary_dims=None, sharp=1.0, offset=0.0, shuffled=False):
        self.dtype, self.heads, self.dims = dtype, heads, dims
        budget = 2400 * heads * 2 * dims * dtype.itemsize
        self.pool = PagePool(1, heads, dims, dtype=dtype, budget_bytes=budget, page_size=page_size)
        self.pool.storage.fill_(torch.nan)
        if shuffled:
            self.pool._free = [self.pool._free[i] for i in cases.permutation(len(self.pool._free))]
        self.rotary = None if rotary_dims == 0 else rotary_table(600, rotary_dims or dims // 4)
        self.sharp, self.offset = sharp, offset

    def rows(self, tokens, seed=19):
        q, k, v = cases.attention_rows(tokens, self.heads, self.dims, self.dtype, seed=seed, sharp=self.sharp)
        q[..., -1] += self.offset
        k[..., -1] += self.offset
        return q, k, v

    def fill(self, sequences, tokens):
        """Puts keys and values of tokens that lie in the pages already, whatever they are."""
        batch = self.pool.batch(sequences, tokens)
        _, k, v = self.rows(batch.tokens, seed=20)
        page = torch.repeat_interleave(torch.arange(len(batch)), batch.queries.diff())
        token = torch.arange(batch.tokens) + (batch.lengths - batch.queries[1:])[page]
        size = self.pool.page_size
        page, place = batch.page_table[page, token // size].long(), token % size
        self.pool.storage[0][page, :, 0, place], self.pool.storage[0][page, :, 1, place] = k, v

    def alone(self, step):
        sequences = [self.pool.sequence() for _ in step]
        self.fill(sequences, [cached for cached, _ in step])
        return sequences, [new for _, new in step]

    def forked(self, prefixes, members, order=None):
        """Every member forks from one of the nested prefixes, the last ones from the deepest."""
        trunk, sequences, held = self.pool.sequence(), [], 0
        for depth, length in enumerate(prefixes):
            self.fill([trunk], [length - held])
            held = length
            sequences += [trunk.fork() for i in range(len(members)) if min(i, len(prefixes) - 1) == depth]
        self.fill(sequences, [cached for cached, _ in members])
        pairs = list(zip(sequences, [new for _, new in members], strict=True))
        pairs = pairs if order is None else [pairs[i] for i in order]
        return [s for s, _ in pairs], [new for _, new in pairs]

    def groups(self, count, prefixes, members):
        """Several trunks with forks of their own, in any order."""
        made = [self.forked([length + 8 * i for length in prefixes], members) for i in range(count)]
        pairs = [pair for sequences, queries in made for pair in zip(sequences, queries, strict=True)]
        pairs = [pairs[i] for i in cases.permutation(len(pairs))]
        return [s for s, _ in pairs], [new for _, new in pairs]

    def attend(self, engine, q, k, v, pages, batch, **options):
        return prefix_attention(q, k, v, pages, batch, **options, backend=engine)

    def run(self, engine, sequences, queries, *, scale=None):
        """Errors of out and of the pages, each as (found, allowed by eager's, found in the largest entry, allowed)."""
        pages = self.pool.layer(0)
        batch = self.pool.batch(sequences, queries)
        q, k, v = self.rows(batch.tokens)
        before = pages.clone()
        arguments = (queries, [s.length for s in sequences], [s.pages for s in sequences])
        true, true_pages = reference(q.double(), k.double(), v.double(), before.double(), *arguments,
                                     rotary=self.rotary, scale=scale)  # fmt: skip
        eager, eager_pages = before.clone(), before.clone()
        eager = prefix_attention(q, k, v, eager_pages, batch, rotary=self.rotary, scale=scale, backend="eager")
        found = self.attend(engine, q, k, v, pages, batch, rotary=self.rotary, scale=scale)
        assert found.dtype == self.dtype and found.shape == q.shape and found.is_contiguous()
        assert torch.equal(pages.isnan(), true_pages.isnan())
        for x, y, z in ((found, eager, true), (pages.nan_to_num(), eager_pages.nan_to_num(), true_pages.nan_to_num())):
            yield from zip(cases.errors(x, z), cases.errors(y, z), strict=True)

    def check(self, *args, more=0.0, **kwargs):
        for error, allowed in self.run(*args, **kwargs):
            assert error <= 2 * allowed + cases.FLOOR[self.dtype] + more, (error, allowed)

    def check_who_sees(self, engine, place, value):
        """NaN or an infinity in the second of two heads reaches those who see it, and nobody in another sequence or
        head."""
        sequences, queries = self.forked((40,), ((0, 1), (3, 1), (17, 1), (8, 30)))
        other, more = self.alone(((30, 1), (0, 20)))
        sequences, queries = sequences + other, queries + more
        batch, pages = self.pool.batch(sequences, queries), self.pool.layer(0)
        rows = dict(zip("qkv", self.rows(batch.tokens), strict=True))
        may = torch.zeros(batch.tokens, 2, dtype=torch.bool)
        if place in rows:
            rows[place][20, 1, 5] = value
            may[20 if place == "q" else slice(3, 33), 1] = True
        else:
            pages[sequences[0].pages[2], 1, "kv".index(place[-1]), 3, 5] = value
            may[:33, 1] = True
        true, _ = reference(*(x.double() for x in rows.values()), pages.double(), queries,
                            [s.length for s in sequences], [s.pages for s in sequences])  # fmt: skip
        found = self.attend(engine, *rows.values(), pages, batch)
        wrong, sees = (~x.isfinite().all(2) for x in (found, true))
        assert sees.any() and not (sees & ~wrong).any() and not (wrong & ~may).any()


DTYPES = (*cases.DTYPES,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("step", cases.STEPS)
def test_sequences_alone(engine, poisoned, step, dtype):
    call = Call(dtype, 2, 64)
    call.check(engine, *call.alone(cases.STEPS[step]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fork", cases.FORKS)
def test_shared_prefixes(engine, poisoned, fork, dtype):
    call = Call(dtype, 2, 64)
    prefixes, members = cases.FORKS[fork]
    call.check(engine, *call.forked(prefixes, members, cases.permutation(len(members))))


GROUPS = (5, (16, 40), ((0, 1), (5, 1), (3, 2), (9, 1)))  # two levels each


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_side_by_side(engine, poisoned, dtype):
    call = Call(dtype, 2, 64)
    call.check(engine, *call.groups(*GROUPS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "dims, rotary_dims",
    [(256, 64), (256, 0), (96, 96), (48, 16), (16, 8), (208, 0), (128, 2), (40, 6), (320, 64)],
)
def test_head_dimensions(engine, poisoned, dims, rotary_dims, dtype):
    if engine != "eager" and (dims % 16 or dims > 256):
        pytest.skip("left to eager")
    call = Call(dtype, 3, dims, rotary_dims=rotary_dims)
    prefixes, members = cases.FORKS["nested"]
    sequences, queries = call.forked(prefixes, members)
    alone = call.alone(((20, 30),))
    call.check(engine, sequences + alone[0], queries + alone[1], scale=0.2)


@pytest.mark.parametrize("page_size", [1, 5, 16, 64])
def test_page_sizes(engine, poisoned, page_size):
    call = Call(torch.float32, 2, 64, page_size=page_size, shuffled=True)
    sequences, queries = call.forked(*cases.FORKS["nested"])
    alone = call.alone(cases.STEPS["mixed"])
    call.check(engine, sequences + alone[0], queries + alone[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("sharp, offset", [(0.0, 0.0), (50.0, 0.0), (0.5, 300.0)])
def test_flat_and_sharp_softmax_and_large_logits(engine, poisoned, sharp, offset, dtype):
    """Weights all equal, a single one, and logits that differ by a few beside one of 1e4 that all share."""
    call = Call(dtype, 2, 64, sharp=sharp, offset=offset, rotary_dims=0)
    # fp32 rounds the logits themselves, in whatever order it sums them.
    rounded = 2**-23 * 64**-0.5 * (offset**2 + 64 * 6 * sharp)
    call.check(engine, *call.forked(*cases.FORKS["many decode"]), more=rounded)
    call.check(engine, *call.alone(cases.STEPS["chunks"]), more=rounded)


def test_positions(engine, poisoned):
    """Rotary positions other than the places."""
    call = Call(torch.float32, 2, 64)
    sequences, queries = call.alone(cases.STEPS["chunks"])
    positions = [(7 * i) % 501 for i in range(sum(queries))]
    batch = call.pool.batch(sequences, queries, positions=positions)
    q, k, v = cases.attention_rows(batch.tokens, 2, 64, torch.float32)
    true, _ = reference(q.double(), k.double(), v.double(), call.pool.layer(0).double(), queries,
                        [s.length for s in sequences], [s.pages for s in sequences], positions=positions,
                        rotary=call.rotary)  # fmt: skip
    found = prefix_attention(q, k, v, call.pool.layer(0), batch, rotary=call.rotary, backend=engine)
    assert max(cases.errors(found, true)) <= 1e-6


def test_views_of_a_fused_product(engine, poisoned):
    """q, k and v as slices of one matrix, and with heads apart."""
    call = Call(torch.float32, 2, 64)
    sequences, queries = call.alone(cases.STEPS["mixed"])
    batch, pages = call.pool.batch(sequences, queries), call.pool.layer(0)
    rows = cases.attention_rows(batch.tokens, 2, 64, torch.float32)
    plain = prefix_attention(*rows, pages, batch, rotary=call.rotary, backend=engine)
    fused = torch.cat([x.flatten(1) for x in rows] + [torch.full((batch.tokens, 9), torch.nan)], 1)
    views = [x.unflatten(1, (2, 64)) for x in fused[:, : 3 * 128].split(128, 1)]
    assert torch.equal(prefix_attention(*views, pages, batch, rotary=call.rotary, backend=engine), plain)
    apart = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in rows]
    assert torch.equal(prefix_attention(*apart, pages, batch, rotary=call.rotary, backend=engine), plain)


def test_nothing_new(engine):
    pages = torch.empty(4, 2, 2, 8, 64)
    batch = PagedBatch([0, 0], [5, 0], [[3], []])
    assert prefix_attention(*torch.empty(3, 0, 2, 64), pages, batch, backend=engine).shape == (0, 2, 64)


def test_no_sequences(engine):
    batch = PagedBatch([], [], [])
    assert prefix_attention(*torch.empty(3, 0, 2, 64), torch.empty(4, 2, 2, 8, 64), batch, backend=engine).numel() == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", ["q", "k", "v", "cached k", "cached v"])
def test_nan_and_inf_reach_those_who_see_them(engine, poisoned, place, value):
    Call(torch.float32, 2, 64, rotary_dims=0).check_who_sees(engine, place, value)


def test_eager_alone_is_sdpa():
    """The oracle against torch's own attention."""
    q, k, v = cases.attention_rows(50, 2, 64, torch.float64)
    pages, tables = torch.full((9, 2, 2, 8, 64), torch.nan, dtype=torch.float64), [list(range(8, 1, -1))]
    true = F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), is_causal=True)
    found, _ = reference(q, k, v, pages, [50], [50], tables)
    torch.testing.assert_close(found, true[0].transpose(0, 1))
