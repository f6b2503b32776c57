"""GPTJ's logits, loss and gradients against transformers' GPT-J with the same weights."""

from __future__ import annotations

import cases
import pytest
import torch
import torch.nn.functional as F
from gptj_cases import ids_of, transformers_gptj

from limber_fast import GPTJ, GPTJConfig
from limber_fast.models import gptj_causal


def lowest_cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(F.cosine_similarity(a.double(), b.double(), dim=-1).min())


def test_float_logits_and_loss_equal_transformers(theirs, ours):
    ids = ids_of(ours, 3, 77)
    labels = ids.masked_fill(torch.arange(77) % 3 == 0, -100)
    expected, found = theirs(ids, labels=labels), ours(ids, labels=labels)
    assert max(cases.errors(found.logits, expected.logits)) < 1e-5
    assert found.logits.shape == expected.logits.shape and found.loss.dtype == torch.float32
    assert abs(float(found.loss - expected.loss)) < 1e-5 * float(expected.loss)


def test_positions_up_to_the_limit_rotate_as_transformers_does(tiny, tiny_ours):
    ids = ids_of(tiny, 1, tiny.config.n_positions)
    assert max(cases.errors(tiny_ours(ids).logits, tiny(ids).logits)) < 1e-5
    gaps = torch.tensor([[0, 1, 5, 40, 95]])
    found, expected = (model(ids[:, :5], position_ids=gaps).logits for model in (tiny_ours, tiny))
    assert max(cases.errors(found, expected)) < 1e-5
    assert max(cases.errors(found, tiny_ours(ids[:, :5]).logits)) > 1e-2  # so positions do matter


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_model_that_is_cast_computes_in_the_new_dtype(theirs, dtype):
    """Its biases with it, which int8 layers otherwise keep in fp32."""
    model = GPTJ.from_pretrained(theirs, dtype=torch.float32)
    for block in model.h:  # random models have none
        block.fc_in.bias.normal_(), block.fc_out.bias.normal_()
    ids = ids_of(model, 2, 60)
    expected = model(ids).logits
    cache = model.new_cache(2)
    found = model.to(dtype)(ids).logits
    assert found.dtype == dtype and lowest_cosine(found, expected) > 0.999
    with pytest.raises(TypeError, match="pages must have the dtype of q"):
        model(ids, cache=cache)
    if dtype == torch.float64:
        model.compute = "w8a8"
        with pytest.raises(TypeError, match="x must be fp16, bf16 or fp32 with compute='w8a8'"):
            model(ids)


def test_w8a16_logits_point_where_the_float_ones_do(theirs):
    ids = ids_of(theirs, 2, 60)
    for dtype in (torch.float32, torch.bfloat16):
        model = GPTJ.from_pretrained(theirs, dtype=dtype)
        assert lowest_cosine(model(ids).logits, theirs(ids).logits) >= 0.9995


def test_w8a8_keeps_outlier_columns():
    """Six features of every LayerNorm's output stand at -60, as in trained models; their weights are as the others."""
    theirs = transformers_gptj("medium")
    for block in theirs.transformer.h:
        block.ln_1.weight[:6], block.ln_1.bias[:6] = 0.01, -60.0
    ids = ids_of(theirs, 2, 60)
    expected = theirs(ids).logits
    found = {
        threshold: lowest_cosine(
            GPTJ.from_pretrained(theirs, compute="w8a8", outlier_threshold=threshold)(ids).logits, expected
        )
        for threshold in (6.0, 0.0)
    }
    assert found[6.0] >= 0.999
    assert found[0.0] < found[6.0]  # rounding the outliers with the rest costs accuracy


def test_gradient_of_inputs_embeds(theirs, ours):
    generator = torch.Generator().manual_seed(4)
    embeds = torch.randn(2, 33, theirs.config.n_embd, generator=generator).requires_grad_()
    labels = ids_of(theirs, 2, 33)
    labels[:, :20] = -100  # soft prompts
    (expected,) = torch.autograd.grad(theirs(inputs_embeds=embeds, labels=labels).loss, embeds)
    (found,) = torch.autograd.grad(ours(inputs_embeds=embeds, labels=labels).loss, embeds)
    assert max(cases.errors(found, expected)) < 1e-5
    for compute in ("w8a16", "w8a8"):
        model = GPTJ.from_pretrained(theirs, compute=compute, dtype=torch.float32)
        before = {name: x.clone() for name, x in model.named_buffers()}
        (found,) = torch.autograd.grad(model(inputs_embeds=embeds, labels=labels).loss, embeds)
        assert lowest_cosine(found.flatten(), expected.flatten()) >= (0.999 if compute == "w8a16" else 0.99)
        assert all(torch.equal(x, before[name]) for name, x in model.named_buffers())


@pytest.mark.parametrize("holes", ["left", "right", "both", "inside"])
def test_masked_tokens_change_nothing(tiny, tiny_ours, holes):
    ids = ids_of(tiny, 3, 20)
    mask = torch.ones_like(ids)
    if holes in ("left", "both"):
        mask[0, :7] = 0
    if holes in ("right", "both"):
        mask[1, 13:] = mask[0, 18:] = 0
    if holes == "inside":
        mask[:, 5:9] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 0] = -100
    expected = tiny(ids, attention_mask=mask, labels=labels)
    found = tiny_ours(ids, attention_mask=mask, labels=labels)
    kept = mask.bool()
    assert max(cases.errors(found.logits[kept], expected.logits[kept])) < 1e-5
    assert torch.equal(found.hidden[~kept], torch.zeros_like(found.hidden[~kept]))
    garbage = torch.where(kept, ids, 0)
    assert torch.equal(tiny_ours(garbage, attention_mask=mask).hidden, found.hidden)
    # transformers also counts predictions that masked tokens make of labelled ones: where there are none, losses agree
    if holes in ("right",):
        assert abs(float(found.loss - expected.loss)) < 1e-5 * float(expected.loss)


def test_masked_gradients(tiny, tiny_ours):
    embeds = torch.randn(2, 11, 84, generator=torch.Generator().manual_seed(5)).requires_grad_()
    mask, labels = torch.ones(2, 11, dtype=torch.bool), ids_of(tiny, 2, 11)
    mask[0, 8:], labels[0, 8:], labels[:, :3] = False, -100, -100
    (expected,) = torch.autograd.grad(tiny(inputs_embeds=embeds, attention_mask=mask, labels=labels).loss, embeds)
    (found,) = torch.autograd.grad(tiny_ours(inputs_embeds=embeds, attention_mask=mask, labels=labels).loss, embeds)
    assert max(cases.errors(found, expected)) < 1e-5
    assert torch.equal(found[0, 8:], torch.zeros(3, 84))


@pytest.mark.parametrize("lengths", [(7, 1, 12, 12, 3), (60, 45, 33, 5, 44, 60, 1)])
def test_packed_sequences_see_themselves_alone(tiny_ours, lengths):
    """Those of like lengths are attended together; hidden states and gradients are those of each alone."""
    x = torch.randn(sum(lengths), 84, generator=torch.Generator().manual_seed(6)).requires_grad_()
    weight = torch.randn(sum(lengths), 84, generator=torch.Generator().manual_seed(7))
    together = tiny_ours.hidden_states(x, lengths)
    alone = torch.cat([tiny_ours.hidden_states(part, [len(part)]) for part in x.split(lengths)])
    assert max(cases.errors(together, alone)) < 1e-6
    (found,), (expected,) = (torch.autograd.grad((y * weight).sum(), x) for y in (together, alone))
    assert max(cases.errors(found, expected)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1, 3, 6])
@pytest.mark.parametrize(("b", "s", "h", "d"), [(5, 13, 4, 48), (1, 257, 2, 28), (2, 65, 2, 80)])
def test_gradient_of_attention_in_16_bits(dtype, scale, b, s, h, d):
    """Twice the error of eager PyTorch's at most, small scores or large ones."""
    x = torch.randn(b, s, 3, h, d, generator=torch.Generator().manual_seed(8))
    x[:, :, :2] *= scale
    x, grad = x.to(dtype).requires_grad_(), torch.randn(b * s, h * d, generator=torch.Generator().manual_seed(9))
    wide = x.detach().double().requires_grad_()

    def eager(x):
        out = torch.nn.functional.scaled_dot_product_attention(*x.permute(2, 0, 3, 1, 4), is_causal=True)
        return out.transpose(1, 2).reshape(b * s, -1)

    (true,) = torch.autograd.grad(eager(wide), wide, grad.to(dtype).double())
    (theirs,) = torch.autograd.grad(eager(x), x, grad.to(dtype))
    out, exact = gptj_causal._causal(x), eager(wide)
    recorded, alone = out.detach(), gptj_causal._causal(x.detach())
    for rows in (recorded, alone):  # what training keeps, and what inference computes
        assert (rows.double() - exact).norm() <= 2 * (eager(x).double() - exact).norm()
    (found,) = torch.autograd.grad(out, x, grad.to(dtype))
    for part in range(3):
        errors = [(y.double() - true)[:, :, part].norm() for y in (found, theirs)]
        assert errors[0] <= 2 * errors[1]


def test_gradient_of_attention_is_not_differentiated_again():
    x = torch.randn(2, 5, 3, 2, 8).bfloat16().requires_grad_()
    out = gptj_causal._causal(x)
    (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(out.sum() + gradient.square().sum(), x)


@pytest.mark.parametrize("lengths", [[32] + [1] * 200, [90, 70, 60, 33, 16, 15, 2, 1, 1], [5]])
def test_padding_is_bounded(lengths):
    groups = gptj_causal._alike(lengths)
    assert sorted(row for rows in groups for row in rows) == list(range(len(lengths)))
    for rows in groups:
        longest = lengths[rows[0]]
        assert all(lengths[row] * (4 if longest > 32 else 2) >= longest * (3 if longest > 32 else 1) for row in rows)


@pytest.mark.parametrize("pieces", [(1,) * 12, (5, 7), (4, 1, 1, 6), (11, 1)])
def test_cache_in_pieces_equals_one_pass(tiny_ours, pieces):
    ids = ids_of(tiny_ours, 3, 12)
    cache, found, at = tiny_ours.new_cache(3), [], 0
    with torch.no_grad():
        for size in pieces:
            found.append(tiny_ours(ids[:, at : at + size], cache=cache).logits)
            at += size
        expected = tiny_ours(ids).logits
    assert max(cases.errors(torch.cat(found, 1), expected)) < 1e-5
    assert cache.lengths == cache.positions == [12] * 3


def test_ragged_cache_goes_on_where_each_row_stopped(tiny_ours):
    ids = ids_of(tiny_ours, 2, 10)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # row 0 has 6 tokens
    with torch.no_grad():
        for more in (1, 3):
            cache, following = tiny_ours.new_cache(2), ids_of(tiny_ours, 2, more, seed=8)
            tiny_ours(ids, attention_mask=mask, cache=cache)
            found = tiny_ours(following, cache=cache).logits
            for row, start in ((0, 4), (1, 0)):
                alone = torch.cat([ids[row, start:], following[row]])[None]
                assert max(cases.errors(found[row], tiny_ours(alone).logits[0, -more:])) < 1e-5


def test_forks_of_a_prompt_share_its_pages(tiny_ours):
    prompt, following = ids_of(tiny_ours, 1, 21), ids_of(tiny_ours, 3, 6, seed=8)
    with torch.no_grad():
        cache = tiny_ours.new_cache(1)
        tiny_ours(prompt, cache=cache)
        held = cache.pool.stats()["pages"]
        forks = cache.fork([0, 0, 0])
        assert cache.pool.stats()["pages"] == held
        found = torch.cat([tiny_ours(part, cache=forks).logits for part in (following[:, :1], following[:, 1:])], 1)
        expected = tiny_ours(torch.cat([prompt.expand(3, -1), following], 1)).logits[:, 21:]
        assert max(cases.errors(found, expected)) < 1e-5
        assert cache.lengths == [21] and forks.lengths == [27] * 3
        forks.truncate([22, 23, 24])
        ragged = tiny_ours(following[:, :1], cache=forks).logits
        for row, length in enumerate((1, 2, 3)):
            alone = torch.cat([prompt[0], following[row, :length], following[row, :1]])[None]
            assert max(cases.errors(ragged[row, 0], tiny_ours(alone).logits[0, -1])) < 1e-5
        forks.release()
        assert cache.pool.stats()["pages"] == held


def test_a_step_that_fails_leaves_the_cache_as_it_was(tiny_ours, monkeypatch):
    ids, cache = ids_of(tiny_ours, 2, 12), tiny_ours.new_cache(2)
    with torch.no_grad():
        tiny_ours(ids[:, :5], cache=cache)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(tiny_ours.h[1].fc_in, "forward", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            tiny_ours(ids[:, 5:9], cache=cache)
        assert cache.lengths == cache.positions == [5, 5]
        found = tiny_ours(ids[:, 5:], cache=cache).logits
    assert max(cases.errors(found, tiny_ours(ids).logits[:, 5:])) < 1e-5


def test_a_row_does_not_depend_on_its_neighbours(tiny_int8):
    ids = ids_of(tiny_int8, 4, 9)
    with torch.no_grad():
        together = tiny_int8(ids).logits
        for row in range(4):
            assert max(cases.errors(tiny_int8(ids[row : row + 1]).logits[0], together[row])) < 1e-6


def test_training_keeps_eight_widths_a_token_and_block():
    """q|k|v 3, gelu's argument 4 and the residual stream 1: 64 KiB in bf16 at GPT-J's width, 1.8 MB in all 28 blocks.
    Neither activations of the products nor what attention gives nor rotated copies are among them."""
    width, layers = 512, 4
    config = GPTJConfig(vocab_size=61, n_embd=width, n_layer=layers, n_head=4, rotary_dim=64)
    model = GPTJ.from_config(config)
    embeds = torch.randn(2, 96, width).requires_grad_()
    held: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        hidden = model(inputs_embeds=embeds).hidden
    hidden.sum().backward()
    stored = {x.untyped_storage().data_ptr() for x in model.buffers()}
    activations = sum(size for at, size in held.items() if at not in stored)
    widths = activations / (2 * 96 * layers) / (2 * width)
    assert 8 <= widths <= 8.4  # the residual stream once more after the last block, and small vectors


def test_parameters_there_are_none(tiny_int8):
    assert not list(tiny_int8.parameters())
    assert tiny_int8.compute == "w8a16" and tiny_int8.dtype == torch.float32


def test_random_weights_have_the_spread_and_the_seed_that_was_asked_for():
    config = GPTJConfig(vocab_size=301, n_embd=132, n_layer=2, n_head=2, rotary_dim=16, initializer_range=0.05)
    one, again, other = (GPTJ.from_config(config, seed, dtype=torch.float32) for seed in (1, 1, 2))
    floating = GPTJ.from_config(config, 1, weights="float", dtype=torch.float32)
    for layer in ("qkv", "fc_out"):
        packed = getattr(one.h[1], layer).weight
        for weight in (packed.dequantize(), getattr(floating.h[1], layer).weight):
            assert abs(float(weight.std()) / 0.05 - 1) < 0.03 and abs(float(weight.mean())) < 1e-3
        q = packed.integers()
        assert torch.equal(packed.row_sums, q.sum(1, dtype=torch.int32))
        assert torch.equal(packed.column_sums, q.sum(0, dtype=torch.int32))
        assert int(packed.packed.int().abs().sum()) == int(q.int().abs().sum())  # padding is 0
        assert q.min() == -127 and q.max() == 127
    ids = ids_of(one, 1, 9)
    assert torch.equal(one(ids).logits, again(ids).logits) and not torch.equal(one(ids).logits, other(ids).logits)
    assert not torch.equal(one.h[0].qkv.weight.packed, one.h[1].qkv.weight.packed)
