"""The last block computes what is asked for and no more: the same states, losses, gradients and texts."""

from __future__ import annotations

import cases
import pytest
import torch
from gptj_cases import ids_of

from limber_fast import GPTJ, GPTJConfig
from limber_fast.models.gptj_layers import Block

MASKS = ("none", "left", "right", "inside", "short")


def mask_of(kind: str, batch: int, length: int) -> torch.Tensor | None:
    mask = torch.ones(batch, length, dtype=torch.long)
    if kind == "left":
        mask[0, :7] = 0
    elif kind == "right":
        mask[1, 13:] = mask[0, 18:] = 0
    elif kind == "inside":
        mask[:, 15:18] = 0
    elif kind == "short":
        mask[1, 2:] = 0  # ends before what is kept
    return None if kind == "none" else mask


@pytest.fixture
def computed(monkeypatch) -> list[list[int]]:
    """Per forward pass, the tokens that come out of each block."""
    seen: list[list[int]] = []
    forward = Block.forward

    def counted(self, x, attend, *rest):
        y = forward(self, x, attend, *rest)
        if attend.keywords["layer"] == 0:
            seen.append([])
        seen[-1].append(len(y))
        return y

    monkeypatch.setattr(Block, "forward", counted)
    return seen


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("keep", [1, 6, 20, 33])
def test_logits_to_keep_are_the_last_of_all(tiny_ours, mask, keep):
    ids, mask = ids_of(tiny_ours, 3, 20), mask_of(mask, 3, 20)
    labels = ids.masked_fill(torch.arange(20) % 3 != 0, -100)
    whole = tiny_ours(ids, attention_mask=mask, labels=labels)
    for given in (None, labels):
        found = tiny_ours(ids, attention_mask=mask, labels=given, logits_to_keep=keep)
        assert found.hidden.shape == (3, min(keep, 20), 84) and found.logits.shape == (3, min(keep, 20), 301)
        assert max(cases.errors(found.hidden, whole.hidden[:, -keep:])) < 1e-6
        if given is not None:
            assert abs(float(found.loss - whole.loss)) < 1e-6 * float(whole.loss)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("again", [False, True])
def test_gradients_of_what_is_kept(tiny_ours, mask, again, monkeypatch):
    monkeypatch.setattr(tiny_ours, "gradient_checkpointing", again)
    embeds = torch.randn(2, 20, 84, generator=torch.Generator().manual_seed(5)).requires_grad_()
    mask, labels = mask_of(mask, 2, 20), ids_of(tiny_ours, 2, 20)
    labels[:, :9] = labels[1, 12:15] = -100
    weight = torch.randn(2, 4, 84, generator=torch.Generator().manual_seed(6))

    def gradient(**options) -> torch.Tensor:
        output = tiny_ours(inputs_embeds=embeds, attention_mask=mask, labels=labels, **options)
        return torch.autograd.grad(output.loss + (output.hidden[:, -4:] * weight).mean(), embeds)[0]

    assert max(cases.errors(gradient(logits_to_keep=4), gradient())) < 1e-5


def test_the_last_block_computes_the_rest_not(tiny_ours, computed):
    ids, labels = ids_of(tiny_ours, 2, 20), torch.full((2, 20), -100)
    labels[:, 17:] = 5
    layers = tiny_ours.config.n_layer
    with torch.no_grad():
        for options, last in (
            ({}, 40), ({"logits_to_keep": 1}, 2), ({"labels": labels, "logits_to_keep": 1}, 2 * 4),
        ):  # fmt: skip
            tiny_ours(ids, **options)
            assert computed.pop() == [40] * (layers - 1) + [last]


@pytest.mark.parametrize("kv_cache", ["float", "int8"])
def test_generation_computes_last_tokens_alone(tiny, computed, kv_cache):
    model = GPTJ.from_transformers(tiny, weights="float", dtype=torch.float32, kv_cache=kv_cache)
    layers, prompts = model.config.n_layer, [ids_of(model, 1, n)[0] for n in (30, 7, 19)]
    texts = model.generate(prompts, max_new_tokens=5, eos_token_id=()).tokens
    assert computed == [[56] * (layers - 1) + [3]] + [[3] * layers] * 4
    computed.clear()
    batch = model.continuous_batch(1 << 20, chunk=16)
    requests = [batch.submit(prompt, max_new_tokens=5, eos_token_id=()) for prompt in prompts]
    while batch.step():
        pass
    assert [request.row.tokens for request in requests] == texts
    prefills = [rows for rows in computed if rows[0] > 3]
    # The prompts begin alike: the last one goes on from the first one's 16 tokens.
    assert [rows[0] for rows in prefills] == [16, 16, 8] and [rows[-1] for rows in prefills] == [0, 1, 2]
    computed.clear()
    with model.prefix(prompts[0]) as prefix:
        assert computed.pop() == [30] * (layers - 1) + [0]
        found = model.generate([prompts[1]], prefix=prefix, max_new_tokens=5, eos_token_id=()).tokens
    assert found == model.generate([torch.cat(prompts[:2])], max_new_tokens=5, eos_token_id=()).tokens


@pytest.mark.parametrize("compute", ["w8a16", "w8a8"])
def test_int8_layers_and_adapters(tiny, compute):
    """A row of a product does not depend on the rows beside it."""
    model = GPTJ.from_transformers(tiny, dtype=torch.bfloat16, compute=compute)
    model.add_adapters(24)
    ids = ids_of(model, 3, 20)
    with torch.no_grad():
        whole, kept = model(ids).hidden[:, -2:], model(ids, logits_to_keep=2).hidden
    assert max(cases.errors(kept.float(), whole.float())) < 1e-2


def test_one_block():
    """The first is the last."""
    model = GPTJ.from_config(GPTJConfig(n_layer=1, n_embd=64, n_head=4, rotary_dim=8, vocab_size=90, n_positions=64))
    ids = ids_of(model, 2, 20)
    with torch.no_grad():
        assert max(cases.errors(model(ids, logits_to_keep=1).logits, model(ids).logits[:, -1:])) < 1e-2


@pytest.mark.parametrize("keep", [-1, 1.5, True, None, "1"])
def test_bad_logits_to_keep(tiny_ours, keep):
    with pytest.raises(ValueError, match="GPTJ: logits_to_keep must be a whole number of at least 1; got"):
        tiny_ours(ids_of(tiny_ours, 1, 4), logits_to_keep=keep)
