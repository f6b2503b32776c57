"""Continuous batching: whatever joins, leaves, shares or is given up, every prompt is answered as if it were alone."""

from __future__ import annotations

import random
import threading

import pytest
import torch

pytest.importorskip("transformers")

from gptj_cases import byte_tokenizer, transformers_gptj

from limber_fast import GPTJ
from limber_fast.cache import CacheFull
from limber_fast.models.gptj_model import FrozenGPTJ
from limber_fast.models.gptj_request import Lookup

PAGE = 8


@pytest.fixture(scope="module")
def model():
    return GPTJ.from_transformers(transformers_gptj("tiny"), weights="float", dtype=torch.float32)


@pytest.fixture
def computed(monkeypatch):
    """Tokens of each forward pass."""
    seen: list[int] = []
    forward = FrozenGPTJ.hidden_states

    def counted(self, x, *args, **options):
        seen.append(len(x))
        return forward(self, x, *args, **options)

    monkeypatch.setattr(FrozenGPTJ, "hidden_states", counted)
    return seen


def token_bytes(model):
    return 2 * model.config.n_layer * model.config.n_embd * 4


def budget(model, tokens):
    return -(-tokens // PAGE) * PAGE * token_bytes(model)


def prompts_of(seed, count=12):
    """Prompts that begin alike in pairs, groups and not at all, up to 60 tokens."""
    random_ = random.Random(seed)
    starts = [ids_of_list(n, s) for n, s in ((3, 1), (17, 2), (32, 3), (0, 4))]
    return [random_.choice(starts) + ids_of_list(random_.randint(1, 24), 100 + i) for i in range(count)]


def ids_of_list(length, seed):
    return random.Random(f"ids {seed}").choices(range(1, 300), k=length)


@pytest.fixture(scope="module")
def alone(model):
    """Each prompt by transformers, one by one, without any cache of ours."""
    theirs = transformers_gptj("tiny")
    known: dict[tuple, list[int]] = {}

    def answer(prompt, new):
        if (key := (tuple(prompt), new)) not in known:
            ids = torch.tensor([prompt])
            said = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new,
                                   pad_token_id=0)  # fmt: skip
            known[key] = said[0, len(prompt) :].tolist()
        return known[key]

    return answer


@pytest.mark.parametrize("seed", range(6))
def test_whatever_joins_and_leaves_answers_are_those_of_each_alone(model, alone, seed):
    random_ = random.Random(seed)
    batch = model.continuous_batch(
        budget(model, random_.choice([110, 200, 2000])), max_batch=random_.choice([1, 3, 100]),
        chunk=random_.choice([1, 7, 20, 2048]),
    )  # fmt: skip
    prompts, requests = prompts_of(seed), []
    for prompt in prompts:
        new = random_.randint(1, 12)
        requests.append((prompt, new, batch.submit(prompt, max_new_tokens=new)))
        for _ in range(random_.randint(0, 4)):
            batch.step()
        if random_.random() < 0.2:
            batch.submit([*prompt[:-1], 5], max_new_tokens=30).cancel()
    for prompt, new, request in random_.sample(requests, len(requests)):
        assert request.wait().row.tokens == alone(prompt, new)
    stats = batch.stats()
    assert (stats["waiting"], stats["prefill"], stats["answering"]) == (0, 0, 0)
    assert stats["kept_pages"] == stats["pool_pages"]  # nobody but the tree holds a page
    batch.tree.clear()
    assert batch.pool.stats()["pages"] == 0


def test_what_is_shared_is_computed_once(model, alone, computed):
    start = ids_of_list(43, 7)
    prompts = [start + ids_of_list(5, 20 + i) for i in range(6)]
    model.keep_prefixes(budget(model, 2000))
    try:
        found = model.generate(prompts, max_new_tokens=4)
        assert found.tokens == [alone(prompt, 4) for prompt in prompts]
        rows = sum(computed) - sum(len(tokens) - 1 for tokens in found.tokens)
        assert rows == 48 + 5 * 5  # the first whole, of the others their own: they part within a page
        computed.clear()
        assert model.generate(prompts, max_new_tokens=4) == found
        assert sum(computed) == sum(len(tokens) for tokens in found.tokens)  # the last token of each, and the answers
        stats = model.shared_batch.stats()
        assert stats["hits"] >= 11 and stats["pool_forks"] == 0
        computed.clear()
        with model.prefix(start) as one, model.prefix(start) as two:
            assert computed == [] and one.length == two.length == 43
            for prefix in (one, two):
                ends = [prompt[43:] for prompt in prompts]
                assert model.generate(ends, prefix=prefix, max_new_tokens=4) == found
        computed.clear()
        for new in (43, 3):  # all of it, and what follows the last whole page
            with model.prefix(ids_of_list(43, 8)):
                assert computed.pop() == new
    finally:
        model.keep_prefixes(None)
    assert model.shared_batch is None


def test_a_bit_of_difference_is_a_miss(model, computed):
    rows = model.embed(torch.tensor(ids_of_list(24, 1)))
    other = rows.clone()
    other[9, 3] = torch.nextafter(other[9, 3], torch.tensor(9.0))
    batch = model.continuous_batch(budget(model, 400))
    for x, new in ((rows, 24), (rows, 1), (other, 24 - 9)):
        computed.clear()
        batch.submit(inputs_embeds=x, max_new_tokens=1).wait()
        assert sum(computed) == new
    computed.clear()
    batch.submit(ids_of_list(24, 1), max_new_tokens=1).wait()
    assert sum(computed) == 1  # the same rows, whoever embedded them


def test_streams_and_cancelling_give_pages_back(model):
    tokenizer = byte_tokenizer()
    batch = model.continuous_batch(budget(model, 300))
    whole = batch.submit("a fox", max_new_tokens=20, tokenizer=tokenizer, eos_token_id=())
    assert "".join(whole.stream()) == whole.row.text and whole.row.stopped == "length"
    batch.tree.clear()
    request = batch.submit("the sea is", max_new_tokens=50, tokenizer=tokenizer, eos_token_id=())
    beside = batch.submit([1, 2, 3], max_new_tokens=50, eos_token_id=())
    for piece in request.stream():
        assert piece
        break
    assert request.row.stopped == "cancelled" and not beside.done
    held = batch.pool.stats()["pages"]
    beside.cancel()
    assert beside.row.tokens and batch.pool.stats()["pages"] <= held
    batch.tree.clear()
    assert batch.pool.stats()["pages"] == 0
    waiting = batch.submit([1, 2], max_new_tokens=3)
    waiting.cancel()
    assert not batch.step() and waiting.row.tokens == []


def test_an_error_in_on_token_reaches_its_owner_alone(model, alone):
    batch = model.continuous_batch(budget(model, 300))

    def fail(token, text):
        raise RuntimeError("reader left")

    prompt = ids_of_list(9, 3)
    good = batch.submit(prompt, max_new_tokens=6)
    bad = batch.submit(ids_of_list(9, 4), max_new_tokens=6, on_token=fail)
    assert good.wait().row.tokens == alone(prompt, 6)
    with pytest.raises(RuntimeError, match="reader left"):
        bad.wait()
    assert bad.row.stopped and batch.stats()["answering"] == 0


def test_threads_share_steps(model, alone):
    model.keep_prefixes(budget(model, 500), max_batch=6)
    found, errors = {}, []

    def work(seed):
        try:
            prompts = prompts_of(seed, 4)
            found[seed] = list(zip(prompts, model.generate(prompts, max_new_tokens=5).tokens, strict=True))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        model.keep_prefixes(None)
    assert not errors and len(found) == 6
    assert all(tokens == alone(prompt, 5) for pairs in found.values() for prompt, tokens in pairs)


def test_memory_that_does_not_suffice(model, alone):
    batch = model.continuous_batch(budget(model, 64))
    with pytest.raises(ValueError, match="fit into the cache, 64 tokens; got 50 and 20; give it more memory"):
        batch.submit(ids_of_list(50, 1), max_new_tokens=20)
    with pytest.raises(ValueError, match="be one prompt; got 2"):
        batch.submit([[1, 2], [3]], max_new_tokens=2)
    prompts = [ids_of_list(40, i) for i in range(4)]
    requests = [batch.submit(prompt, max_new_tokens=9) for prompt in prompts]
    batch.step()
    assert batch.stats()["waiting"] == 3  # one at a time is what fits
    for prompt, request in zip(prompts, requests, strict=True):
        assert request.wait().row.tokens == alone(prompt, 9)
    assert batch.stats()["evicted_pages"] > 0
    held = batch.pool.sequence()
    batch.pool.batch([held], [48])
    request = batch.submit(prompts[0], max_new_tokens=9)
    small = batch.submit([7], max_new_tokens=2)
    with pytest.raises(CacheFull, match="which others hold"):
        request.wait()
    assert small.wait().row.tokens == alone([7], 2) and request.row.tokens == []
    held.release()
    assert batch.submit(prompts[0], max_new_tokens=9).wait().row.tokens == alone(prompts[0], 9)


def test_nothing_is_kept_of_a_model_that_changed(computed):
    model = GPTJ.from_transformers(transformers_gptj("tiny"), dtype=torch.float32)
    model.keep_prefixes(budget(model, 300))
    prompt = ids_of_list(20, 5)

    def tokens_computed():
        computed.clear()
        model.generate([prompt], max_new_tokens=1)
        return sum(computed)

    assert [tokens_computed(), tokens_computed()] == [20, 1]
    model.compute = "w8a8"
    assert [tokens_computed(), tokens_computed()] == [20, 1]
    model.add_adapters(8)
    assert [tokens_computed(), tokens_computed()] == [20, 1]
    model.train_adapters()
    assert [tokens_computed(), tokens_computed()] == [20, 20]
    model.train_adapters(False)
    assert [tokens_computed(), tokens_computed()] == [20, 1]


def test_draws_do_not_depend_on_the_company(model):
    prompts = prompts_of(3, 5)
    how = dict(temperature=1.2, top_p=0.9, eos_token_id=())
    one = [model.generate([prompt], max_new_tokens=8, seed=i, **how).tokens[0] for i, prompt in enumerate(prompts)]
    batch = model.continuous_batch(budget(model, 600), chunk=5)
    requests = [batch.submit(prompt, max_new_tokens=8, seed=i, **how) for i, prompt in enumerate(prompts)]
    batch.submit(prompts[0], max_new_tokens=3)  # a greedy one beside them
    assert [request.wait().row.tokens for request in requests] == one


def test_drafts_change_no_token_and_save_passes(model, computed):
    """Also where eos, a stop string, max_new_tokens or another request's end come within a draft."""
    tokenizer = byte_tokenizer()
    prompts = [ids_of_list(1 + seed, seed) for seed in range(8)]
    for how in ({"eos_token_id": ()}, {"eos_token_id": (17, 200, 31, 5)}, {"stop_strings": ["a", "Q", "\u0120"]}):
        how = dict(how, max_new_tokens=70, tokenizer=tokenizer)
        plain = model.generate(prompts, **how)
        assert model.generate(prompts, lookup=8, **how) == plain
    passes = []
    for prompt in prompts:
        computed.clear()
        model.generate([prompt], max_new_tokens=70, eos_token_id=(), lookup=8)
        passes.append(len(computed))
    assert min(passes) < 35 and max(passes) <= 70  # some random models' texts end in a loop
    for new in range(1, 20):
        expected = model.generate(prompts[:3], max_new_tokens=new, eos_token_id=())
        assert model.generate(prompts[:3], max_new_tokens=new, eos_token_id=(), lookup=16) == expected
    batch = model.continuous_batch(budget(model, 400))
    requests = [batch.submit(prompt, max_new_tokens=40, eos_token_id=(), lookup=5) for prompt in prompts]
    expected = model.generate(prompts, max_new_tokens=40, eos_token_id=()).tokens
    assert [request.wait().row.tokens for request in requests] == expected
    again = [batch.submit([*prompt, *said[:-1]], max_new_tokens=1, eos_token_id=())
             for prompt, said in zip(prompts, expected, strict=True)]  # fmt: skip
    assert [request.wait().row.tokens for request in again] == [said[-1:] for said in expected]  # right ones were kept


def test_drafts_repeat_what_followed_and_pause_when_they_fail():
    lookup = Lookup([1, 2, 3, 4, 5, 1, 2, 3], most=6)
    assert lookup.draft(10) == [4, 5, 1, 2] and lookup.draft(2) == [4, 5]
    lookup.learn(4, 4)
    assert lookup.draft(10) == [4, 5, 1, 2, 3, 4]  # longer, and round the phrase
    lookup.learn(0, 6)
    assert [lookup.draft(9) for _ in range(3)] == [[], [4, 5, 1, 2], [4, 5, 1, 2]]
    lookup.learn(0, 4)
    assert [bool(lookup.draft(9)) for _ in range(4)] == [False, False, False, True]
    lookup.learn(1, 4)
    assert lookup.draft(9) == [4, 5]
    lookup.add(9)
    assert lookup.draft(9) == []
