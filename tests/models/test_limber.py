"""Limber against the same written in plain PyTorch over transformers' GPT-J."""


import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

from gptj_cases import D, K, byte_tokenizer, features_of, limber_of, transformers_gptj

from limber_fast import Limber
from limber_fast.models.limber import DECODING, IMAGE


@pytest.fixture(scope="module")
def theirs():
    return transformers_gptj("tiny")


@pytest.fixture
def limber(theirs):
    return limber_of(theirs)


def plain(limber, theirs, features, before=(), text=()):
    """[1, S, E] of ids, one picture and ids, in the dtype of `theirs`."""
    wte = theirs.transformer.wte.weight
    soft = F.linear(features.to(wte), limber.projection.weight.to(wte), limber.projection.bias.to(wte))
    ids = [torch.tensor(x, dtype=torch.long) for x in (before, text)]
    return torch.cat([wte[ids[0]], soft, wte[ids[1]]])[None]


@pytest.mark.parametrize("prompt", ["", "A picture of"])
def test_loss_and_gradients_are_the_plain_ones(limber, theirs, prompt):
    captions = ["a red fox", "b", "an octopus of the sea"]
    features = features_of(3)
    limber(features, captions, prompt=prompt).backward()
    opening = limber.tokenizer(prompt).input_ids
    exact = transformers_gptj("tiny").double()
    weight, bias = (p.detach().double().requires_grad_() for p in limber.projection.parameters())
    total, count = 0, 0
    for x, caption in zip(features.double(), captions, strict=True):
        ids = torch.tensor([*limber.tokenizer(caption).input_ids, 0])
        given = exact.transformer.wte.weight[torch.tensor(opening, dtype=torch.long)], exact.transformer.wte.weight[ids]
        embeds = torch.cat([F.linear(x, weight, bias), *given])[None]
        logits = exact(inputs_embeds=embeds).logits[0, K + len(opening) - 1 : -1]
        total, count = total + F.cross_entropy(logits, ids, reduction="sum"), count + len(ids)
    (total / count).backward()
    torch.testing.assert_close(limber(features, captions, prompt=prompt).double(), total / count, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(limber.projection.weight.grad.double(), weight.grad, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(limber.projection.bias.grad.double(), bias.grad, atol=1e-6, rtol=1e-4)
    assert all(p.grad is None for p in limber.language_model.parameters())


def test_captions_are_those_of_transformers(limber, theirs):
    features, prompt = features_of(3), "A picture of"
    found = limber.caption(features, prompt, max_new_tokens=12)
    ids = limber.tokenizer(prompt).input_ids
    for x, text in zip(features, found, strict=True):
        embeds = plain(limber, theirs, x, text=ids)
        said = theirs.generate(inputs_embeds=embeds, max_new_tokens=12, do_sample=False, pad_token_id=0)[0]
        assert text == limber.tokenizer.decode(said, skip_special_tokens=True).strip()


def test_answers_see_shots_and_stop_at_the_separator(limber, theirs):
    features, (one, two) = features_of(2, 5), features_of(2, 6)
    shots = [(one, "what?", "fox"), (two, "who?", "cat")]
    found = limber.answer(features, ["where?", "why?"], shots, max_new_tokens=8)
    tokens, wte = limber.tokenizer, theirs.transformer.wte.weight
    for x, question, text in zip(features, ("where?", "why?"), found, strict=True):
        parts = [one, "Q: what? A: fox\n", two, "Q: who? A: cat\n", x, f"Q: {question} A:"]
        rows = [wte[tokens(p).input_ids] if isinstance(p, str) else limber.projection(p) for p in parts]
        embeds = torch.cat(rows)[None].detach()
        said = theirs.generate(inputs_embeds=embeds, max_new_tokens=8, do_sample=False, pad_token_id=0)[0]
        assert text == tokens.decode(said, skip_special_tokens=True).partition("\n")[0].strip()
    for i, question in enumerate(["where?", "why?"]):
        assert limber.answer(features[i : i + 1], [question], shots, max_new_tokens=8) == [found[i]]


def test_shots_are_computed_once(limber, monkeypatch):
    features, (one, two) = features_of(3, 5), features_of(2, 6)
    shots = [(one, "what?", "fox"), (two, "who?", "cat")]
    questions = ["where?", "why?", "what is it for?"]
    inline = limber.answer(features, questions, shots, max_new_tokens=6)
    seen = []
    hidden_states = type(limber.language_model).hidden_states

    def counted(self, x, *args, **options):
        seen.append(len(x))
        return hidden_states(self, x, *args, **options)

    monkeypatch.setattr(type(limber.language_model), "hidden_states", counted)
    with limber.prefix(shots) as prefix:
        length, before = prefix.length, prefix.cache.pool.stats()
        assert seen == [length]
        found = limber.answer(features, questions, prefix=prefix, max_new_tokens=6)
        assert found == inline
        assert seen[1] == sum(K + len(limber.tokenizer(f"Q: {q} A:").input_ids) for q in questions)  # and no shot
        assert limber.answer(features[:1], questions[:1], prefix=prefix, max_new_tokens=6) == inline[:1]
        after = prefix.cache.pool.stats()
        assert after["pages"] == before["pages"] and after["forks"] == 4
        with pytest.raises(ValueError, match="prefix must take the place of shots"):
            limber.answer(features, questions, shots, prefix=prefix)
    with pytest.raises(ValueError, match="prefix must be in use; got one that was released"):
        limber.answer(features, questions, prefix=prefix)


@pytest.mark.parametrize(
    ("shots", "message"),
    [([("picture", "what?", "fox"), ("picture", "what?")],
      r"shots\[1\] must be \(picture, question, answer\); got 2 entries"),
     (["fox"], r"shots\[0\] must be \(picture, question, answer\); got str"),
     ("fox", r"shots must be a list of \(picture, question, answer\); got str")],
)  # fmt: skip
def test_shots_are_checked(limber, shots, message):
    with pytest.raises((ValueError, TypeError), match=f"Limber: {message}"):
        limber.answer(features_of(1), ["where?"], shots)
    with pytest.raises((ValueError, TypeError), match=rf"Limber\.prefix: {message}"):
        limber.prefix(shots)


def test_ragged_prompts_do_not_meet(limber):
    features = features_of(3)
    prompts = [[IMAGE, "abc"], ["x", IMAGE], [IMAGE]]
    rows, lengths = limber.inputs_embeds(features, prompts)
    assert lengths == [K + 3, K + 1, K] and len(rows) == sum(lengths)
    soft = limber.projection(features)
    torch.testing.assert_close(rows[:K], soft[0])
    torch.testing.assert_close(rows[K + 4 : K + 4 + K], soft[1])
    torch.testing.assert_close(rows[-K:], soft[2])


def test_limbers_decoding_is_its_sampler():
    """Against the published rule: drop what lies beyond a tenth of the probability, then sample at temperature 0.7."""
    from limber_fast.models.gptj_generate import Sampler

    logits = torch.randn(12, 50, generator=torch.Generator().manual_seed(0))
    logits[:6] *= 0.2  # flat rows: several tokens stay
    sampler, draws = Sampler(**DECODING["limber"]), 4000
    generators = [torch.Generator().manual_seed(i) for i in range(draws)]
    for row in logits:
        ordered, ids = row.double().sort(descending=True)
        kept = torch.cat([torch.tensor([True]), ordered.softmax(-1).cumsum(-1)[:-1] <= 0.1])
        expected = torch.zeros(50, dtype=torch.float64)
        expected[ids] = (ordered / 0.7).masked_fill(~kept, -torch.inf).softmax(-1)
        found = torch.bincount(torch.tensor(sampler(row.expand(draws, -1), generators)), minlength=50) / draws
        assert not found[expected == 0].any()
        assert (found - expected).abs().max() < 5 * 0.5 / draws**0.5
        assert row.abs().max() > 1 or kept.sum() > 2


def test_sampling_is_reproducible(limber):
    features = features_of(2)
    one, again = (limber.caption(features, decoding="limber", max_new_tokens=10, seed=3) for _ in range(2))
    assert one == again and len(one) == 2


def test_dropout_and_layer_norm_of_magma(theirs):
    limber = limber_of(theirs, layer_norm=True, dropout=0.5).train()
    features = features_of(2)
    a, b = (limber(features, ["ab", "c"], seed=4) for _ in range(2))
    other = limber(features, ["ab", "c"], seed=5)
    assert torch.equal(a, b) and not torch.equal(a, other)
    a.backward()
    assert limber.layer_norm.weight.grad.abs().sum() > 0 and not limber.language_model.training


def test_bad_calls_are_one_line(limber, theirs):
    features = features_of(2)
    with pytest.raises(ValueError, match="captions must be 2, one for each picture; got 1"):
        limber(features, ["a"])
    with pytest.raises(ValueError, match="questions must be 2"):
        limber.answer(features, ["a"])
    with pytest.raises(ValueError, match="decoding must be one of 'greedy', 'limber'"):
        limber.caption(features, decoding="beam")
    with pytest.raises(ValueError, match="there is no encoder"):
        limber.caption(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="width must be given"):
        Limber(None, limber.language_model)
    with pytest.raises(ValueError, match="tokenizer must be given"):
        Limber(None, limber.language_model, width=D).caption(features)


def test_prompts_before_captions(limber):
    features = features_of(2)
    for prompt in (["A picture of"], b"A", None, 5):
        with pytest.raises(TypeError, match="Limber: prompt must be a text"):
            limber(features, ["a", "b"], prompt=prompt)
    room = limber.language_model.config.n_positions - K - 1
    assert limber.loss(features, ["a", "bc"], prompt="x" * (room - 1))[1] == 4  # one token of each, and the end
    with pytest.raises(ValueError, match=r"prompt must leave room for a caption in n_positions = 96; got 95 tokens"):
        limber(features, ["a", "b"], prompt="x" * room)
    with pytest.raises(ValueError, match="captions must be at least one; got none"):
        limber(features[:0], [])


def test_what_is_empty_or_no_list(limber):
    features = features_of(2)
    assert limber.caption([]) == [] == limber.caption(features[:0]) == limber.answer(features[:0], [])
    shots = [(features[0], "a", "b")]
    assert limber.answer(features[:0], [], shots) == []
    with pytest.raises(TypeError, match="questions must be a list of texts; got str"):
        limber.answer(features, "ab")
    with pytest.raises(TypeError, match="captions must be a list of texts; got str"):
        limber(features, "ab")
    with pytest.raises(ValueError, match=r"features \[n, k, 24\]; got shape"):
        limber.caption(torch.zeros(2, K, D + 1))
    asked = limber.answer(features, iter(["a", "b"]), iter(shots), max_new_tokens=4)
    assert asked == limber.answer(features, ["a", "b"], shots, max_new_tokens=4)


def test_questions_of_many_bytes_and_captions_too_long(limber):
    features = features_of(2)
    shots = [(features[0], "무엇입니까", "여우")]
    assert len(limber.answer(features, ["이것은 무엇입니까?", "왜?"], shots, max_new_tokens=3)) == 2
    whole, cut = (limber(features[:1], ["a" * n]) for n in (96 - K - 1, 500))
    assert torch.equal(whole, cut)


def test_answers_are_reproducible(limber):
    one, again = (limber.answer(features_of(2), ["a", "b"], decoding="limber", max_new_tokens=8) for _ in range(2))
    assert one == again


def test_tokenizers_that_close_every_text(limber):
    class Closing:
        def __call__(self, text, add_special_tokens=True):
            found = byte_tokenizer()(text)
            found["input_ids"] = found.input_ids + [0] * add_special_tokens
            return found

    plain = limber.token_ids([IMAGE, "abc"], K)
    limber.tokenizer = Closing()
    assert torch.equal(limber.token_ids([IMAGE, "abc"], K), plain)


@pytest.mark.parametrize("decoding", ["greedy", "limber"])
def test_batches_change_nothing(limber, decoding):
    features = features_of(5)
    whole = limber.caption(features, decoding=decoding, max_new_tokens=8)
    done, pieces = [], {}

    def on_token(row, token, text):
        pieces[row] = pieces.get(row, "") + text

    found = limber.caption(
        features, decoding=decoding, max_new_tokens=8, batch_size=2, on_token=on_token,
        progress=lambda n, of: done.append((n, of)),
    )  # fmt: skip
    assert found == whole and done == [(2, 5), (4, 5), (5, 5)]
    assert [pieces[row].strip() for row in range(5)] == whole
    questions, shots = ["a", "what is it?", "why?", "b", "where"], [(features[0], "what?", "fox")]
    whole = limber.answer(features, questions, shots, decoding=decoding, max_new_tokens=6)
    done.clear()
    found = limber.answer(features, questions, shots, decoding=decoding, max_new_tokens=6, batch_size=2,
                          on_token=on_token, progress=lambda n, of: done.append((n, of)))  # fmt: skip
    assert found == whole and done[-1] == (5, 5)
    with pytest.raises(ValueError, match="batch_size must be a whole number of at least 1"):
        limber.caption(features, batch_size=0)


def test_a_text_that_spells_the_end_of_text_does_not_end(limber):
    text = "a <|endoftext|> b<|endoftext|>"
    ids = limber.token_ids([text], K).tolist()
    assert 0 not in ids and limber.tokenizer.decode(ids) == text
    assert 0 in limber.tokenizer(text).input_ids  # which is what a tokenizer makes of it by itself
    whole = limber(features_of(1), [text])
    assert torch.equal(whole, limber(features_of(1), [ids]))
