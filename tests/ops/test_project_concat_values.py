"""inputs_embeds and every gradient against float64: at most twice the error of eager PyTorch in the same dtype."""

from __future__ import annotations

from functools import cache

import cases
import pytest
import torch
from torch import Tensor

from limber_fast import project_concat
from limber_fast.reference.project_concat import kept
from limber_fast.reference.project_concat import project_concat as reference

LEAVES = ("features", "weight", "bias", "ln_weight", "ln_bias")
EPS, SEED, P = 1e-5, 2026, 0.1
KINDS = {"plain": (False, False), "dropout": (True, False), "layer norm": (False, True), "magma": (True, True)}


def _inputs(prompt: str, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    rows = cases.PROMPTS[prompt]
    return cases.projection("".join(rows).count("i"), *shape, dtype), cases.prompts(rows, shape[0])


def _run(function, values: dict[str, Tensor], input_ids: Tensor, kind: str, dtype=None, **options) -> dict[str, Tensor]:
    """inputs_embeds and the gradients of LEAVES, from one random gradient."""
    x = {name: value.detach().to(dtype or value.dtype).requires_grad_() for name, value in values.items()}
    layer_norm = (x["ln_weight"], x["ln_bias"], EPS) if KINDS[kind][1] else None
    out = function(
        x["features"], x["weight"], x["bias"], input_ids, x["embedding"].detach(), image_token_id=cases.IMAGE_TOKEN,
        layer_norm=layer_norm, **options,
    )  # fmt: skip
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(16), dtype=torch.float64)
    names = LEAVES if layer_norm else LEAVES[:3]
    gradients = torch.autograd.grad(out, [x[name] for name in names], grad.to(values["weight"].dtype).to(out.dtype))
    return {"inputs_embeds": out.detach(), **dict(zip(names, gradients, strict=True))}


@cache
def _truth(kind: str, prompt: str, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[dict, dict]:
    """float64 results, and those of eager PyTorch in `dtype`."""
    values, input_ids = _inputs(prompt, shape, dtype)
    p = P if KINDS[kind][0] else 0.0
    mask = None
    if p:
        rows = values["features"].shape[0] * shape[0]
        mask = (kept(SEED, p, rows, shape[2]) / (1 - p)).to(dtype)
    true = _run(reference, values, input_ids, kind, torch.float64, dropout_p=p, seed=SEED)
    return true, _run(cases.eager_project_concat, values, input_ids, kind, mask=mask)


def _check(engine: str, kind: str, prompt: str, shape: tuple[int, int, int], dtype: torch.dtype, truth=_truth) -> None:
    values, input_ids = _inputs(prompt, shape, dtype)
    true, eager = truth(kind, prompt, shape, dtype)
    p = P if KINDS[kind][0] else 0.0
    found = _run(project_concat, values, input_ids, kind, dropout_p=p, seed=SEED, backend=engine)
    for name, of_eager in eager.items():
        assert found[name].dtype == dtype and found[name].shape == true[name].shape
        bound = zip(cases.errors(found[name], true[name]), cases.errors(of_eager, true[name]), strict=True)
        for error, allowed in bound:
            assert error <= 2 * allowed + cases.FLOOR[dtype], (name, error, allowed)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("shape", cases.PROJECTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_shapes(engine, poisoned, kind, shape, dtype):
    _check(engine, kind, "few-shot", shape, dtype)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("prompt", cases.PROMPTS)
def test_prompts(engine, poisoned, prompt, dtype):
    _check(engine, "magma", prompt, (9, 96, 64), dtype)


@pytest.mark.parametrize("shape, kind, dtype", cases.ENCODERS.values(), ids=cases.ENCODERS)
def test_encoders_in_front_of_gptj(poisoned, shape, kind, dtype):
    """On the instruction set of this machine; nothing is kept of results as large as these."""
    _check("cpu", kind, "one image", shape, dtype, _truth.__wrapped__)


@pytest.mark.parametrize("kind", ["plain", "magma"])
def test_float64_runs_on_eager(kind):
    values, input_ids = _inputs("few-shot", (3, 33, 65), torch.float64)
    p = P if KINDS[kind][0] else 0.0
    true = _run(reference, values, input_ids, kind, dropout_p=p, seed=SEED)
    for name, found in _run(project_concat, values, input_ids, kind, dropout_p=p, seed=SEED).items():
        torch.testing.assert_close(found, true[name], rtol=1e-11, atol=1e-11)


def test_reference_is_linear_and_concatenation():
    """The float64 oracle itself, against torch's own modules put together by hand."""
    values, _ = _inputs("one image a row", (4, 12, 6), torch.float64)
    features, embedding = values["features"], values["embedding"]
    linear = torch.nn.Linear(12, 6, dtype=torch.float64)
    text = torch.arange(9).reshape(3, 3)
    input_ids = torch.cat([torch.full((3, 4), cases.IMAGE_TOKEN), text], 1)
    found = reference(features, linear.weight, linear.bias, input_ids, embedding, image_token_id=cases.IMAGE_TOKEN)
    torch.testing.assert_close(found, torch.cat([linear(features), embedding[text]], 1))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16, torch.float16, torch.int8], ids=str)
def test_embedding_rows_are_converted_exactly(engine, poisoned, table, dtype):
    values, input_ids = _inputs("few-shot", (3, 33, 65), dtype)
    if table == torch.int8:
        rows = torch.arange(-128, 127).repeat(17)[: cases.VOCABULARY * 65].reshape(cases.VOCABULARY, 65)
        scales = torch.linspace(0.01, 3, cases.VOCABULARY)
        embedding, exact = (rows.to(torch.int8), scales), rows.float() * scales[:, None]
    else:
        embedding = exact = values["embedding"].to(table)
    found = project_concat(values["features"], values["weight"], None, input_ids, embedding,
                           image_token_id=cases.IMAGE_TOKEN, backend=engine)  # fmt: skip
    text = input_ids != cases.IMAGE_TOKEN
    assert torch.equal(found[text], exact[input_ids[text]].to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 33, 65), (49, 64, 130)], ids=str)
def test_layouts(engine, poisoned, shape, dtype):
    values, input_ids = _inputs("few-shot", shape, dtype)
    names = ("features", "weight", "bias", "embedding")
    features, weight, bias, embedding = (values[name] for name in names)

    def run(features, weight, bias, input_ids, embedding, spread=lambda out: out):
        leaves = [x.detach().requires_grad_() for x in (features, weight, bias)]
        out = spread(project_concat(*leaves, input_ids, embedding.detach(), image_token_id=cases.IMAGE_TOKEN,
                                    backend=engine))  # fmt: skip
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(17)).to(dtype)
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    plain = run(features, weight, bias, input_ids, embedding)
    with_class_token = torch.cat([features[:, :1], features], 1)
    layouts = {
        "class token sliced off": (with_class_token[:, 1:], weight, bias, input_ids, embedding),
        "channels first": (features.mT.contiguous().mT, weight, bias, input_ids, embedding),
        "slices": (torch.cat([features, features], 2)[..., : shape[1]], torch.cat([weight, weight], 1)[:, : shape[1]],
                   bias.repeat_interleave(2)[::2], input_ids, torch.cat([embedding, embedding], 1)[:, : shape[2]]),
        "transposed": (features, weight.T.contiguous().T, bias, input_ids.T.contiguous().T, embedding.T.contiguous().T),
        "32-bit ids": (features, weight, bias, input_ids.int(), embedding),
    }  # fmt: skip
    for name, arguments in layouts.items():
        for x, y in zip(run(*arguments), plain, strict=True):
            assert torch.equal(x, y), name
    for x, y in zip(run(features, weight, bias, input_ids, embedding, lambda out: out.transpose(0, 1))[1:],
                    run(features, weight, bias, input_ids, embedding, lambda out: out.transpose(0, 1).contiguous())[1:],
                    strict=True):  # fmt: skip
        assert torch.equal(x, y)  # the gradient arrives with its batch dimension inside
    leaf = weight.clone().requires_grad_()
    project_concat(features, leaf, bias, input_ids, embedding, image_token_id=cases.IMAGE_TOKEN, backend=engine).sum(
    ).backward()  # fmt: skip
    torch.testing.assert_close(leaf.grad, features.sum((0, 1)).expand(shape[2], -1), rtol=0.02, atol=0.2)


@pytest.mark.parametrize("kind", ["plain", "magma"])
@pytest.mark.parametrize("wanted", [(1,), (2,), (0,), (0, 2), (3,), (4,), (1, 3, 4)], ids=str)
def test_frozen_parameters_change_nothing_for_the_others(engine, poisoned, wanted, kind):
    wanted = [i for i in wanted if i < 3 or kind == "magma"]
    values, input_ids = _inputs("few-shot", (9, 33, 65), torch.float32)
    p = P if KINDS[kind][0] else 0.0

    def run(chosen):
        x = {name: values[name].detach().requires_grad_(i in chosen) for i, name in enumerate(LEAVES)}
        out = project_concat(
            x["features"], x["weight"], x["bias"], input_ids, values["embedding"], dropout_p=p, seed=SEED,
            image_token_id=cases.IMAGE_TOKEN, backend=engine,
            layer_norm=(x["ln_weight"], x["ln_bias"], EPS) if kind == "magma" else None,
        )  # fmt: skip
        return torch.autograd.grad(out.square().sum(), [x[LEAVES[i]] for i in chosen])

    if wanted:
        every = range(5 if kind == "magma" else 3)
        for i, found in zip(wanted, run(wanted), strict=True):
            assert torch.equal(found, run(every)[i])


def test_prompts_without_images(engine, poisoned):
    input_ids = cases.prompts(("ttt", "tttt"), 5)
    weight, embedding = torch.randn(65, 33, requires_grad=True), torch.randn(cases.VOCABULARY, 65)
    out = project_concat(torch.empty(0, 5, 33), weight, None, input_ids, embedding, image_token_id=cases.IMAGE_TOKEN,
                         dropout_p=0.5, layer_norm=(None, None, EPS), backend=engine)  # fmt: skip
    assert torch.equal(out, embedding[input_ids])
    out.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("layer_norm", [False, True])
def test_module_parameters_of_layer_norm(engine, layer_norm):
    values, input_ids = _inputs("few-shot", (3, 33, 65), torch.bfloat16)
    module = torch.nn.LayerNorm(65, bias=False, elementwise_affine=layer_norm, dtype=torch.bfloat16)
    out = project_concat(values["features"], values["weight"], values["bias"], input_ids, values["embedding"],
                         image_token_id=cases.IMAGE_TOKEN, layer_norm=module, backend=engine)  # fmt: skip
    rows = out[input_ids == cases.IMAGE_TOKEN].float()
    torch.testing.assert_close(rows.mean(1), torch.zeros(len(rows)), rtol=0, atol=1e-2)
    torch.testing.assert_close(rows.std(1), torch.ones(len(rows)), rtol=2e-2, atol=0)
    if layer_norm:
        out.square().sum().backward()
        assert module.weight.grad.dtype == torch.bfloat16 and module.weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["plain", "dropout", "magma"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", ["features", "weight", "bias", "grad"])
@pytest.mark.parametrize("k", [1, 9])
def test_nan_and_inf_propagate_as_in_eager(engine, poisoned, k, place, value, kind, dtype):
    """Not finite exactly where eager's results are not; one bad value, also under a mask's zeros."""
    values, input_ids = _inputs("few-shot", (k, 33, 65), dtype)
    p = 0.5 if KINDS[kind][0] else 0.0
    mask = (kept(SEED, p, 5 * k, 65) / (1 - p)).to(dtype) if p else None

    def run(function, **options):
        x = {name: value.detach().clone() for name, value in values.items()}
        if place != "grad":
            x[place].view(-1)[-2] = value
        leaves = [x[name].requires_grad_() for name in LEAVES[: 5 if kind == "magma" else 3]]
        layer_norm = (x["ln_weight"], x["ln_bias"], EPS) if kind == "magma" else None
        out = function(*leaves[:3], input_ids, x["embedding"], image_token_id=cases.IMAGE_TOKEN, layer_norm=layer_norm,
                       **options)  # fmt: skip
        grad = torch.ones_like(out)
        if place == "grad":
            where = (input_ids == cases.IMAGE_TOKEN).nonzero()[-1]
            grad[where[0], where[1], 60:] = value
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    found = run(project_concat, dropout_p=p, seed=SEED, backend=engine)
    for name, x, y in zip(("inputs_embeds", *LEAVES), found, run(cases.eager_project_concat, mask=mask), strict=False):
        assert torch.equal(x.isfinite(), y.isfinite()), name
