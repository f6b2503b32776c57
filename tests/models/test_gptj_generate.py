"""Generation: the tokens of transformers' own, and everything that chooses or ends them."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from gptj_cases import byte_tokenizer, ids_of

from limber_fast.models.gptj_generate import Row, Sampler, Stopping

PROMPTS = (7, 1, 19, 4)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def prompts(model, lengths=PROMPTS) -> list[torch.Tensor]:
    return [ids_of(model, 1, length, seed=length)[0] for length in lengths]


def transformers_tokens(theirs, ids: torch.Tensor, new: int) -> list[int]:
    said = theirs.generate(ids[None], do_sample=False, max_new_tokens=new, pad_token_id=0)[0, len(ids) :]
    return said.tolist()


def test_greedy_tokens_are_those_of_transformers(theirs, ours):
    ids = prompts(ours)
    found = ours.generate(ids, max_new_tokens=25)
    for row, prompt in enumerate(ids):
        expected = transformers_tokens(theirs, prompt, 25)
        assert found.tokens[row] == expected
        assert found.stopped[row] == ("eos" if expected[-1] == 0 else "length")
    assert found.texts is None


def test_every_form_of_a_prompt_says_the_same(tiny_int8, tokenizer):
    model, texts = tiny_int8, ["a dog", "w", "Q: what? A:"]
    ids = [tokenizer(text).input_ids for text in texts]
    width = max(map(len, ids))
    left = torch.zeros(3, width, dtype=torch.long)
    mask = torch.zeros(3, width, dtype=torch.long)
    for row, tokens in enumerate(ids):
        left[row, width - len(tokens) :], mask[row, width - len(tokens) :] = torch.tensor(tokens), 1
    embeds = [model.embed(torch.tensor(tokens)) for tokens in ids]
    expected = model.generate(ids, max_new_tokens=12)
    assert model.generate(texts, max_new_tokens=12, tokenizer=tokenizer).tokens == expected.tokens
    assert model.generate([torch.tensor(x) for x in ids], max_new_tokens=12) == expected
    assert model.generate(left, attention_mask=mask, max_new_tokens=12) == expected
    assert model.generate(inputs_embeds=embeds, max_new_tokens=12) == expected
    assert model.generate(inputs_embeds=model.embed(left), attention_mask=mask, max_new_tokens=12) == expected
    for row, text in enumerate(texts):
        assert model.generate(text, max_new_tokens=12, tokenizer=tokenizer).tokens == expected.tokens[row : row + 1]
        assert model.generate(ids[row], max_new_tokens=12).tokens == expected.tokens[row : row + 1]


def test_prompt_of_embeddings_that_are_no_words(theirs, ours):
    embeds = torch.randn(1, 6, ours.config.n_embd, generator=torch.Generator().manual_seed(2)) / 2
    expected = theirs.generate(inputs_embeds=embeds, do_sample=False, max_new_tokens=15, pad_token_id=0)[0].tolist()
    assert ours.generate(inputs_embeds=embeds, max_new_tokens=15).tokens[0] == expected


def test_draws_repeat_with_the_seed_and_ignore_the_neighbours(tiny_int8):
    ids = prompts(tiny_int8)
    how = dict(max_new_tokens=15, temperature=1.3, eos_token_id=())
    one = tiny_int8.generate(ids, seed=5, **how)
    assert one == tiny_int8.generate(ids, seed=5, **how) != tiny_int8.generate(ids, seed=6, **how)
    assert tiny_int8.generate(ids[:2], seed=5, **how).tokens == one.tokens[:2]
    torch.manual_seed(1)
    free = tiny_int8.generate(ids, **how)
    assert free != tiny_int8.generate(ids, **how)
    torch.manual_seed(1)
    assert free == tiny_int8.generate(ids, **how)


# p of tokens 0 to 5, by hand
PROBABILITIES = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.15, 0.05])


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (Sampler(1.0), PROBABILITIES),
        (Sampler(0.5), PROBABILITIES**2),
        (Sampler(1.0, top_k=2), torch.tensor([0, 0.4, 0, 0.25, 0, 0])),
        (Sampler(1.0, top_k=100), PROBABILITIES),
        (Sampler(1.0, top_p=0.6), torch.tensor([0, 0.4, 0, 0.25, 0, 0])),
        (Sampler(1.0, top_p=0.7), torch.tensor([0, 0.4, 0, 0.25, 0.15, 0])),
        (Sampler(1.0, top_p=0.01), torch.tensor([0, 1.0, 0, 0, 0, 0])),
        (Sampler(1.0, top_p=1.0), PROBABILITIES),
        (Sampler(1.0, top_k=3, top_p=0.6), torch.tensor([0, 0.4, 0, 0.25, 0, 0])),
        (Sampler(0.0), torch.tensor([0, 1.0, 0, 0, 0, 0])),
    ],
)
def test_share_of_each_token(sampler, expected):
    draws, generator = 4000, torch.Generator().manual_seed(0)
    logits = (PROBABILITIES.log() + 3).expand(draws, -1)
    drawn = sampler(logits, [generator] * draws)
    found = torch.bincount(torch.tensor(drawn), minlength=6) / draws
    expected = expected / expected.sum()
    assert torch.equal(found > 0, expected > 0)
    assert (found - expected).abs().max() < 4 * math.sqrt(0.25 / draws)  # four standard deviations


@pytest.mark.parametrize("flat", [True, False])
def test_nucleus_beyond_the_first_tokens(flat):
    """A flat distribution needs more tokens than are looked at first; a row beside it draws as it does alone."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 2000, generator=generator) * torch.tensor([[0.1 if flat else 8.0], [8.0]])
    sampler, draws = Sampler(1.0, top_p=0.5), 300

    def drawn(rows: list[int]) -> list[list[int]]:
        generators = [torch.Generator().manual_seed(row) for row in rows]
        return [sampler(logits[rows], generators) for _ in range(draws)]

    both = drawn([0, 1])
    assert [row[1] for row in both] == [row[0] for row in drawn([1])]
    probabilities = logits[0].double().softmax(-1).sort(descending=True)
    size = int((probabilities.values.cumsum(-1) < 0.5).sum()) + 1
    assert {row[0] for row in both} <= set(probabilities.indices[:size].tolist())
    assert (size > 256) == flat == (len({row[0] for row in both}) > 100)


def letters(text: str, **how) -> Row:
    """A row that was given one letter a token."""
    row = Row(Stopping(tokenizer=SimpleNamespace(decode=lambda ids, **_: "".join(map(chr, ids))), **how))
    row.pieces = []
    for index, letter in enumerate(text):
        row.pieces.append(row.add(ord(letter), last=index == len(text) - 1))
        if row.stopped:
            break
    return row


def test_stop_strings_are_cut_off_and_never_streamed():
    row = letters("one two\nQ: three", strings=("\nQ:", "xx"))
    assert (row.text, row.stopped) == ("one two", "stop_string")
    assert "".join(row.pieces) == row.text and len(row.tokens) == len("one two\nQ:")
    row = letters("a\nQ b\nQ", strings=("\nQ:",))  # twice the beginning of one
    assert (row.text, row.stopped, "".join(row.pieces)) == ("a\nQ b\nQ", "length", "a\nQ b\nQ")
    assert row.pieces[1:4] == ["", "", "\nQ "]
    assert letters("abc", strings=("b", "ab")).text == ""


def test_repetition_ends_a_text():
    assert letters("so so and", repetition=3).stopped == "length"
    row = letters("a big big big big dog", repetition=3)
    assert (row.stopped, row.text) == ("repetition", "a big big big")
    assert letters("xyyz", repetition=2).text == "xyy"
    assert letters("abcabcabc", repetition=3).stopped == "repetition"
    assert letters("abcabcab", repetition=3).stopped == "length"


def test_pieces_hold_whole_characters(tokenizer):
    row, text = Row(Stopping(tokenizer=tokenizer)), "né 🐶!"
    tokens = tokenizer(text).input_ids
    pieces = [row.add(token, last=at == len(tokens) - 1) for at, token in enumerate(tokens)]
    assert len(tokens) > len(text) and "".join(pieces) == row.text == text
    assert all("\ufffd" not in piece for piece in pieces) and pieces.count("") == len(tokens) - len(text)


def test_callback_hears_every_token_and_the_final_text(tiny_int8, tokenizer):
    heard: dict[int, tuple[list[int], str]] = {row: ([], "") for row in range(4)}

    def listen(row: int, token: int, text: str) -> None:
        heard[row] = ([*heard[row][0], token], heard[row][1] + text)

    found = tiny_int8.generate(
        prompts(tiny_int8), max_new_tokens=30, temperature=1.5, top_k=200, seed=0, tokenizer=tokenizer, on_token=listen,
        stop_strings=["e", "1"],
    )  # fmt: skip
    assert [heard[row][0] for row in range(4)] == found.tokens
    assert [heard[row][1] for row in range(4)] == found.texts
    assert len(set(map(len, found.tokens))) > 1  # rows that ended early left the batch
    for row, text in enumerate(found.texts):
        assert not {"e", "1"} & set(text)
        assert (found.stopped[row] == "length") == (len(found.tokens[row]) == 30)


def test_end_of_text_ends_one_row_and_not_the_others(tiny_int8):
    ids = prompts(tiny_int8)
    free = tiny_int8.generate(ids, max_new_tokens=20, eos_token_id=())
    assert all(len(tokens) == 20 for tokens in free.tokens) and set(free.stopped) == {"length"}
    end = free.tokens[2][5]
    found = tiny_int8.generate(ids, max_new_tokens=20, eos_token_id=[end, 299])
    for row, tokens in enumerate(free.tokens):
        at = min((tokens.index(x) for x in (end, 299) if x in tokens), default=19)
        assert found.tokens[row] == tokens[: at + 1]
    assert found.stopped[2] == "eos"


def test_prefill_asks_the_head_for_last_positions_alone(tiny_int8, monkeypatch):
    asked, head = [], tiny_int8.lm_head.forward
    monkeypatch.setattr(tiny_int8.lm_head, "forward", lambda x: asked.append(len(x)) or head(x))
    tiny_int8.generate(prompts(tiny_int8), max_new_tokens=3, eos_token_id=())
    assert asked == [4, 4, 4]


def test_the_last_token_of_the_context_can_be_written(tiny, tiny_ours):
    limit = tiny.config.n_positions
    (ids,) = prompts(tiny, (limit - 3,))
    assert tiny_ours.generate([ids], max_new_tokens=3, eos_token_id=()).tokens[0][:3] == transformers_tokens(
        tiny, ids, 3
    )
    contract = (
        rf"max_new_tokens must fit behind the prompts within n_positions = {limit}; got 4 behind 93 tokens of pro"
    )
    with pytest.raises(ValueError, match=contract):
        tiny_ours.generate([ids[:2], ids], max_new_tokens=4)
