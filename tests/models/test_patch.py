"""transformers' own GPT-J with its modules swapped: every way of generating says what it said before."""

from __future__ import annotations

import copy

import cases
import pytest
import torch
import transformers
from gptj_cases import ids_of, transformers_gptj

from limber_fast import patch, quantize_int8, unpatch


def rounded(model):
    """The model with the weights that int8 replaces rounded to it, in floating point."""
    model = copy.deepcopy(model)
    layers = [layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)]
    assert len(layers) == 6 * model.config.n_layer + 1
    for layer in layers:
        layer.weight.data = quantize_int8(layer.weight).dequantize(layer.weight.dtype)
    return model


def ragged(model) -> dict[str, torch.Tensor]:
    ids = ids_of(model, 3, 9)
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[2, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def embeds(model) -> torch.Tensor:
    return torch.randn(2, 7, model.config.n_embd, generator=torch.Generator().manual_seed(1)) / 2


MODES = {
    "greedy": lambda model: dict(inputs=ids_of(model, 2, 9)),
    "beam": lambda model: dict(inputs=ids_of(model, 2, 9), num_beams=3),
    "left padding": ragged,
    "beam with left padding": lambda model: ragged(model) | dict(num_beams=2),
    "inputs_embeds": lambda model: dict(inputs_embeds=embeds(model)),
    "static cache": lambda model: dict(inputs=ids_of(model, 2, 9), cache_implementation="static"),
    "static cache with left padding": lambda model: ragged(model) | dict(cache_implementation="static"),
    "no cache": lambda model: dict(inputs=ids_of(model, 2, 9), use_cache=False),
    "sampling": lambda model: dict(inputs=ids_of(model, 2, 9), do_sample=True, temperature=1.5),
}


def said(model, mode: str) -> list[list[int]]:
    torch.manual_seed(0)
    how = dict(do_sample=False, max_new_tokens=12, pad_token_id=0, eos_token_id=-1) | MODES[mode](model)
    return model.generate(**how).tolist()


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def plain(request):
    model = transformers_gptj("tiny")
    model.set_attn_implementation(request.param)
    return model


@pytest.fixture(scope="module")
def plain_rounded(plain):
    return rounded(plain)


@pytest.fixture
def patched(plain):
    def make(weights: str, **how):
        model = copy.deepcopy(plain)
        report = patch(model, weights=weights, strict=True, **how)
        assert not report.skipped
        return model

    return make


@pytest.mark.parametrize("mode", MODES)
def test_float_weights_change_no_token(plain, patched, mode):
    assert said(patched("float"), mode) == said(plain, mode)


@pytest.mark.parametrize("mode", MODES)
def test_int8_says_what_the_rounded_weights_say(plain_rounded, patched, mode):
    assert said(patched("int8"), mode) == said(plain_rounded, mode)


def test_logits_and_gradients(plain, plain_rounded, patched):
    inputs, labels = embeds(plain).requires_grad_(), ids_of(plain, 2, 7)
    for weights, reference in (("float", plain), ("int8", plain_rounded)):
        results = []
        for model in (patched(weights), reference):
            out = model(inputs_embeds=inputs, labels=labels)
            results.append((out.logits, torch.autograd.grad(out.loss, inputs)[0]))
        for found, expected in zip(*results, strict=True):
            assert max(cases.errors(found, expected)) < (1e-5 if weights == "float" else 2e-4)


def test_trained_weights_still_get_their_gradients(plain):
    results = []
    for weights in (None, "float"):
        model = copy.deepcopy(plain).requires_grad_()
        if weights:
            patch(model, weights=weights)
        model(ids_of(model, 2, 9), labels=ids_of(model, 2, 9)).loss.backward()
        results.append({name: x.grad for name, x in model.named_parameters()})
    assert results[0].keys() == results[1].keys()  # and the names of a checkpoint stay
    for name, expected in results[0].items():
        assert max(cases.errors(results[1][name], expected)) < 1e-4


def test_report_names_every_module_and_unpatch_restores_each(plain):
    model = copy.deepcopy(plain)
    before, modules = {name: x.clone() for name, x in model.state_dict().items()}, dict(model.named_modules())
    report = patch(model, compute="w8a8")
    blocks = [f"transformer.h.{i}.{part}" for i in range(3) for part in ("attn", "mlp")]
    assert set(report.patched) == {*blocks, "lm_head"} and not report.skipped
    assert report.patched["transformer.h.2.mlp"] == "PatchedMLP (int8, w8a8)"
    assert str(report) == "patched 7 modules, left 0 alone"
    assert not any(isinstance(module, torch.nn.Linear) for module in model.modules())
    assert sorted(unpatch(model)) == sorted(report.patched)
    assert {id(x) for x in model.modules()} == {id(x) for x in modules.values()}
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert unpatch(model) == []


def test_int8_lets_go_of_the_floating_point_weights(plain):
    model = copy.deepcopy(plain)
    before = sum(x.nbytes for x in model.parameters())
    patch(model, keep_original=False)
    embeddings = model.transformer.wte.weight.nbytes
    assert sum(x.nbytes for x in model.parameters()) < embeddings + (before - embeddings) / 20
    with pytest.raises(
        ValueError, match=r"transformer.h.0.attn must have been patched with keep_original=True; got Fal"
    ):
        unpatch(model)


def test_bare_and_wrapped_models(plain):
    bare = copy.deepcopy(plain).transformer
    assert len(patch(bare, "float", strict=True).patched) == 6
    wrapper = torch.nn.ModuleDict({"lm": copy.deepcopy(plain)})
    assert "lm.transformer.h.0.attn" in patch(wrapper, strict=True).patched
    assert len(unpatch(wrapper)) == 7


class Adapter(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def test_what_was_not_expected_is_reported_and_left_alone(plain):
    model = copy.deepcopy(plain)
    model.transformer.h[1].mlp = Adapter(model.transformer.h[1].mlp)
    model.transformer.h[2].attn.k_proj = Adapter(model.transformer.h[2].attn.k_proj)
    ids = ids_of(model, 1, 5)
    expected, classes = model(ids).logits, [type(module) for module in model.modules()]
    with pytest.raises(
        ValueError, match=r"(?s)strict: patched 0 modules, left 2 alone.*h.1.mlp: expected GPTJMLP, found A"
    ):
        patch(model, "float", strict=True)
    assert [type(module) for module in model.modules()] == classes
    report = patch(model, "float")
    assert report.skipped == {
        "transformer.h.1.mlp": "expected GPTJMLP, found Adapter",
        "transformer.h.2.attn": "expected k_proj to be a linear layer, found Adapter",
    }
    assert len(report.patched) == 4 and max(cases.errors(model(ids).logits, expected)) < 1e-5
    report = patch(model, "float")
    assert report.skipped["transformer.h.0.mlp"] == "it is patched already: unpatch the model first"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: setattr(x.config, "activation_function", "relu"), "expected the activation gelu_new, found relu"),
        (lambda x: setattr(x.config, "_attn_implementation", "flash_attention_2"), "found flash_attention_2"),
        (lambda x: setattr(x.config, "n_layer", 5), "expected 5 GPTJBlocks, found 3"),
        (lambda x: setattr(x, "lm_head", torch.nn.Identity()), "lm_head: expected Linear, found Identity"),
    ],
)
def test_strict_raises_on_every_deviation(plain, change, said):
    model = copy.deepcopy(plain)
    change(model)
    with pytest.raises(ValueError, match=said):
        patch(model, strict=True)


def test_models_that_are_no_gptj():
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="model must hold a GPTJModel of transformers; got GPT2LMHeadModel"):
        patch(gpt2)
    with pytest.raises(TypeError, match="model must be a transformers GPT-J; got str"):
        patch("gpt-j")
    with pytest.raises(ValueError, match="weights must be one of 'int8', 'float'; got 'int4'"):
        patch(gpt2, weights="int4")
