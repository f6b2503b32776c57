"""GPTJ(kv_cache='int8'): generation over keys and values in int8."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

from gptj_cases import SIZES, ids_of, transformers_gptj

from limber_fast import GPTJ, GPTJConfig


@pytest.fixture(scope="module")
def model():
    """Heads of 128 dimensions, for the project's own kernels; in fp32, where few tokens are nearly ties."""
    return GPTJ.from_transformers(transformers_gptj("medium"), dtype=torch.float32, kv_cache="int8")


def _prompts(model, lengths):
    return [ids_of(model, 1, n, seed=n)[0].tolist() for n in lengths]


def test_hidden_states_hardly_change(model):
    ids = ids_of(model, 2, 120)
    found = {}
    for kind in ("float", "int8"):
        model.kv_cache = kind
        cache = model.new_cache(2, 128)
        assert cache.pool.storage.dtype == (torch.int8 if kind == "int8" else torch.float32)
        first = model(ids[:, :100], cache=cache).hidden
        found[kind] = torch.cat([first, model(ids[:, 100:], cache=cache).hidden], 1).float()
    assert F.cosine_similarity(*found.values(), dim=-1).min() >= 0.999
    assert not torch.equal(*found.values())


def test_memory(model):
    bytes_of = {}
    for kind in ("float", "int8"):
        model.kv_cache = kind
        pool = model.new_cache(1, 256).pool
        bytes_of[kind] = pool.page_bytes / pool.page_size
    dims = model.config.head_dim
    assert bytes_of["int8"] / bytes_of["float"] == (dims + 4) / (4 * dims)


@pytest.mark.parametrize("shared", [1, 16, 21])
def test_same_tokens_alone_together_and_from_a_prefix(model, shared):
    model.kv_cache = "int8"
    start = _prompts(model, [shared])[0]
    ends = _prompts(model, [2, 7, 30])
    alone = [model.generate([start + end], max_new_tokens=8, eos_token_id=()).tokens[0] for end in ends]
    assert model.generate([start + end for end in ends], max_new_tokens=8, eos_token_id=()).tokens == alone
    with model.prefix(start) as prefix:
        assert prefix.cache.pool.storage.dtype == torch.int8
        assert model.generate(ends, prefix=prefix, max_new_tokens=8, eos_token_id=()).tokens == alone
    with_tree = model.continuous_batch(1 << 24, chunk=8)
    requests = [with_tree.submit(start + end, max_new_tokens=8, eos_token_id=()) for end in ends for _ in range(2)]
    while with_tree.step():
        pass
    assert [request.row.tokens for request in requests] == [tokens for tokens in alone for _ in range(2)]


def test_saved_and_loaded(model, tmp_path):
    model.kv_cache = "int8"
    model.save_pretrained(tmp_path)
    assert GPTJ.from_pretrained(tmp_path).kv_cache == "int8"
    assert GPTJ.from_pretrained(tmp_path, kv_cache="float").kv_cache == "float"


def test_unknown_kind():
    config = GPTJConfig(**SIZES["tiny"])
    with pytest.raises(ValueError, match=r"^GPTJ: kv_cache must be one of 'float', 'int8'; got 'int4'"):
        GPTJ(config, kv_cache="int4")
    model = GPTJ(config, device="meta")
    with pytest.raises(ValueError, match=r"^GPTJ: kv_cache must be one of 'float', 'int8'; got None"):
        model.kv_cache = None
