"""GPTJ.prefix: prompts that go on from one beginning say what they say alone."""

import pytest
import torch

pytest.importorskip("transformers")

from gptj_cases import byte_tokenizer, ids_of, transformers_gptj

from limber_fast import GPTJ


@pytest.fixture(scope="module")
def model():
    return GPTJ.from_transformers(transformers_gptj("tiny"), weights="float", dtype=torch.float32)


@pytest.mark.parametrize("shared", [1, 7, 16, 33])
def test_same_tokens_as_whole_prompts(model, shared):
    start = ids_of(model, 1, shared)[0].tolist()
    ends = [ids_of(model, 1, n, seed=n)[0].tolist() for n in (1, 5, 18)]
    expected = model.generate([start + end for end in ends], max_new_tokens=12, eos_token_id=())
    with model.prefix(start) as prefix:
        assert prefix.length == shared
        for _ in range(2):
            found = model.generate(ends, prefix=prefix, max_new_tokens=12, eos_token_id=())
            assert found.tokens == expected.tokens
        embeds = [model.embed(torch.tensor(end)) for end in ends]
        found = model.generate(inputs_embeds=embeds, prefix=prefix, max_new_tokens=12, eos_token_id=())
        assert found.tokens == expected.tokens
        sampled = [model.generate(p, prefix=q, max_new_tokens=9, temperature=1.0, seed=5).tokens
                   for p, q in ((ends, prefix), ([start + end for end in ends], None))]  # fmt: skip
        assert sampled[0] == sampled[1]


def test_prefixes_of_text_and_of_embeddings(model):
    tokens = byte_tokenizer()
    with model.prefix("a fox", tokenizer=tokens) as one:
        ids = torch.tensor(tokens("a fox").input_ids)
        with model.prefix(inputs_embeds=model.embed(ids)) as two:
            a, b = (model.generate(" is", prefix=p, tokenizer=tokens, max_new_tokens=6) for p in (one, two))
            assert a.tokens == b.tokens
            assert a.tokens == model.generate("a fox is", tokenizer=tokens, max_new_tokens=6).tokens


def test_memory_comes_back_whatever_happens(model):
    def stop(row, token, text):
        raise RuntimeError("reader left")

    with model.prefix(ids_of(model, 1, 20)[0].tolist()) as prefix:
        used = prefix.cache.pool.stats()["pages"]
        with pytest.raises(RuntimeError, match="reader left"):
            model.generate([[1, 2], [3]], prefix=prefix, max_new_tokens=4, on_token=stop)
        assert prefix.cache.pool.stats()["pages"] == used
    assert prefix.length == 0 and prefix.cache.pool.stats()["pages"] == 0


def test_errors(model):
    with model.prefix(ids_of(model, 1, 60)[0].tolist()) as prefix:
        with pytest.raises(ValueError, match="40 behind 62 tokens of prompt 1"):
            model.generate([[1], [2, 3]], prefix=prefix, max_new_tokens=40)
        with pytest.raises(TypeError, match=r"prefix must be made by GPTJ\.prefix; got list"):
            model.generate([[1]], prefix=[1, 2])
        other = GPTJ.from_transformers(transformers_gptj("tiny"), weights="float", dtype=torch.bfloat16)
        with pytest.raises(ValueError, match="prefix must be of this model; got one of another"):
            other.generate([[1]], prefix=prefix)
    with pytest.raises(ValueError, match="in use; got one that was released"):
        model.generate([[1]], prefix=prefix)
    with pytest.raises(ValueError, match="n_positions = 96"):
        model.prefix(ids_of(model, 1, 97)[0].tolist())
