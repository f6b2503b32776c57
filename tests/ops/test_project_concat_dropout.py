"""The dropout mask: the same bits on every backend, in both passes, for any split of the work; and fair."""

from __future__ import annotations

import cases
import numpy as np
import pytest
import torch

from limber_fast import project_concat
from limber_fast.reference.project_concat import kept, random_words

SEEDS = (0, 1, 2**32, 2**63 - 1)


def _mask(engine, seed, p, k=7, d=33, e=131, dtype=torch.float32):
    """What dropout leaves of soft prompts that are all 1, and of a gradient that is all 1, per column."""
    input_ids = cases.prompts(("iti", "tit"), k)
    bias = torch.ones(e, dtype=dtype, requires_grad=True)
    features, weight = torch.zeros(3, k, d, dtype=dtype), torch.zeros(e, d, dtype=dtype)
    embedding = torch.zeros(cases.VOCABULARY, e, dtype=dtype)
    out = project_concat(features, weight, bias, input_ids, embedding, image_token_id=cases.IMAGE_TOKEN, dropout_p=p,
                         seed=seed, backend=engine)  # fmt: skip
    (columns,) = torch.autograd.grad(out.sum(), bias)
    return out.detach()[input_ids == cases.IMAGE_TOKEN], columns


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 7, 49])
@pytest.mark.parametrize("seed", SEEDS)
def test_mask_is_the_reference_s(engine, poisoned, seed, k, dtype):
    rows, columns = _mask(engine, seed, 0.5, k, dtype=dtype)
    true = kept(seed, 0.5, 3 * k, 131)
    assert torch.equal(rows, 2 * true.to(dtype))
    assert torch.equal(columns, (2 * true.sum(0)).to(dtype))


@pytest.mark.parametrize("p", [1e-12, 0.1, 0.5, 1 - 1e-9])
def test_mask_at_any_rate(engine, p):
    rows, _ = _mask(engine, 3, p)
    assert torch.equal(rows != 0, kept(3, p, 21, 131))


def test_gradients_of_weight_and_features_see_the_mask(engine):
    input_ids = cases.prompts(("i", "i"), 9)
    features = torch.eye(18).reshape(2, 9, 18).requires_grad_()
    weight = torch.ones(40, 18, requires_grad=True)
    out = project_concat(features, weight, None, input_ids, torch.zeros(5, 40), image_token_id=cases.IMAGE_TOKEN,
                         dropout_p=0.5, seed=11, backend=engine)  # fmt: skip
    d_features, d_weight = torch.autograd.grad(out.sum(), (features, weight))
    true = 2.0 * kept(11, 0.5, 18, 40)
    assert torch.equal(d_weight, true.T)  # one row of features each
    assert torch.equal(d_features.reshape(18, 18), true.sum(1, keepdim=True).expand(18, 18))


def test_seed_comes_from_the_default_generator(engine):
    torch.manual_seed(5)
    first, second = _mask(engine, None, 0.5)[0], _mask(engine, None, 0.5)[0]
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(_mask(engine, None, 0.5)[0], first)
    state = torch.get_rng_state()
    _mask(engine, None, 0.0), _mask(engine, 7, 0.5)
    assert torch.equal(torch.get_rng_state(), state)  # without dropout, or with a seed, nothing is drawn


def test_seed_as_a_tensor(engine):
    assert torch.equal(_mask(engine, torch.tensor([9]), 0.5)[0], _mask(engine, 9, 0.5)[0])


# 1024 x 1024 words a seed; bounds are six standard deviations, so that a fair mask fails one time in 10^8.
WORDS = {seed: random_words(seed, 1024, 1024) for seed in (0, 1, 2, 12345, 2**40)}


@pytest.mark.parametrize("seed", WORDS)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate_overall_by_row_and_by_column(seed, p):
    dropped = WORDS[seed] < p * 2**32
    spread = (p * (1 - p)) ** 0.5
    assert abs(dropped.mean() - p) < 6 * spread / 1024
    for axis in (0, 1):
        rates = dropped.mean(axis)
        assert np.abs(rates - p).max() < 6 * spread / 32
        # Neither more nor less even than independent draws: the variance of the rates has a chi-squared law.
        assert abs(rates.var() * 1024 / spread**2 - 1) < 6 * (2 / 1024) ** 0.5


@pytest.mark.parametrize("seed", WORDS)
def test_every_bit_is_fair(seed):
    bits = (WORDS[seed][..., None] >> np.arange(32, dtype=np.uint32)) & 1
    assert np.abs(bits.mean((0, 1)) - 0.5).max() < 6 * 0.5 / 1024


def test_neighbours_and_seeds_are_independent():
    def related(a, b):
        a, b = (x.astype(np.float64).ravel() / 2**32 - 0.5 for x in (a, b))
        return abs((a * b).mean()) * 12 * len(a) ** 0.5  # in standard deviations

    words = WORDS[0]
    for step in (1, 2, 3, 16, 32, 512):
        assert related(words[:, :-step], words[:, step:]) < 6 and related(words[:-step], words[step:]) < 6
        assert related(words[:-step, :-step], words[step:, step:]) < 6
    names = list(WORDS)
    for i, one in enumerate(names):
        for other in names[:i]:
            assert related(WORDS[one], WORDS[other]) < 6
            assert related(WORDS[one][:-1], WORDS[other][1:]) < 6
