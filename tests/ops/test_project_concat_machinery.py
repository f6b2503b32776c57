"""torch.library registration, torch.compile, autocast and dispatch."""

from __future__ import annotations

import cases
import pytest
import torch

from limber_fast import dispatch, project_concat

FORWARD, BACKWARD = torch.ops.limber_fast.project_concat_fwd.default, torch.ops.limber_fast.project_concat_bwd.default
K, D, E = 3, 7, 5

CALLS = {  # bias, layer norm parameters, int8, dropout_p, eps
    "plain": (True, False, False, 0.0, None),
    "without bias": (False, False, True, 0.0, None),
    "dropout": (True, False, False, 0.3, None),
    "magma": (True, True, True, 0.3, 1e-5),
    "bare norm": (True, False, False, 0.0, 1e-5),
}


def _arguments(engine: str, call: str, requires_grad: bool) -> tuple:
    bias, norm, int8, p, eps = CALLS[call]

    def leaf(*shape):
        return torch.randn(shape).requires_grad_(requires_grad)

    ids = cases.prompts(cases.PROMPTS["few-shot"], K)
    table = torch.randn(cases.VOCABULARY, E)
    return (
        leaf(5, K, D), leaf(E, D), leaf(E) if bias else None, *((leaf(E), leaf(E)) if norm else (None, None)), ids,
        table.to(torch.int8) if int8 else table, torch.rand(cases.VOCABULARY) if int8 else None,
        torch.tensor(3) if p else None, cases.IMAGE_TOKEN, p, eps, engine,
    )  # fmt: skip


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_opcheck_forward(engine, call, requires_grad):
    torch.library.opcheck(FORWARD, _arguments(engine, call, requires_grad))


@pytest.mark.parametrize("needs", [[True] * 5, [False, True, True, False, False], [True, False, False, False, True]])
@pytest.mark.parametrize("call", CALLS)
def test_opcheck_backward(engine, call, needs):
    arguments = _arguments(engine, call, False)
    out, positions = FORWARD(*arguments)
    needs = [need and x is not None for need, x in zip(needs, arguments[:5], strict=True)]
    torch.library.opcheck(
        BACKWARD, (torch.randn_like(out), *arguments[:5], positions, arguments[8], *arguments[10:], needs)
    )


def _step(features, weight, bias, ids, embedding, norm, **options):
    return project_concat(features * 1.5, weight, bias, ids, embedding, image_token_id=cases.IMAGE_TOKEN,
                          layer_norm=norm, **options) * 2  # fmt: skip


# What is compiled ends at the op: one instruction set stands for all.
@pytest.mark.parametrize("engine, compiler", [("eager", "aot_eager"), ("cpu", "inductor")])
def test_compile_whole_graph_with_dynamic_shapes(engine, compiler):
    torch._dynamo.reset()
    compiled = torch.compile(_step, fullgraph=True, dynamic=True, backend=compiler)
    norm = torch.nn.LayerNorm(E)
    for n in (1, 2, 4):
        ids = cases.prompts(("itt", "ti" + "t" * n) * n, K)
        values = cases.projection(2 * n, K, D, E, torch.float32)
        leaves = [values[name].clone().requires_grad_() for name in ("features", "weight", "bias")]
        for options in ({"norm": None}, {"norm": norm, "dropout_p": 0.3, "seed": n}):
            wanted = [*leaves, *norm.parameters()] if options["norm"] else leaves
            results = []
            for function in (compiled, _step):
                out = function(*leaves, ids, values["embedding"], **options, backend=engine)
                results.append((out, *torch.autograd.grad(out.square().sum(), wanted)))
            for found, true in zip(*results, strict=True):
                torch.testing.assert_close(found, true)


def test_compiled_dropout_draws_a_seed_each_call():
    torch._dynamo.reset()
    values = cases.projection(2, K, D, E, torch.float32)
    arguments = (values["features"], values["weight"], values["bias"], cases.prompts(("i", "i"), K),
                 values["embedding"], None)  # fmt: skip
    compiled = torch.compile(_step, fullgraph=True, backend="aot_eager")
    assert not torch.equal(compiled(*arguments, dropout_p=0.5), compiled(*arguments, dropout_p=0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_a_linear_does(engine, dtype):
    values = cases.projection(5, K, 64, 48, torch.float32)
    ids = cases.prompts(cases.PROMPTS["few-shot"], K)
    names = ("features", "weight", "bias")
    leaves = [values[name].clone().requires_grad_() for name in names]
    norm = torch.nn.LayerNorm(48)
    options = {"image_token_id": cases.IMAGE_TOKEN, "layer_norm": norm, "backend": engine}
    with torch.autocast("cpu", dtype=dtype):
        out = project_concat(*leaves, ids, values["embedding"], **options)
    out.float().square().sum().backward()
    cast = [values[name].to(dtype).requires_grad_() for name in names]
    same = project_concat(*cast, ids, values["embedding"], **options)
    same.float().square().sum().backward()
    assert out.dtype == dtype and torch.equal(out, same)
    for x, y in zip(leaves, cast, strict=True):
        assert x.grad.dtype == torch.float32 and torch.equal(x.grad, y.grad.float())
    assert norm.weight.grad.dtype == torch.float32


def test_autocast_leaves_float64_alone():
    values = cases.projection(1, K, D, E, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = project_concat(values["features"], values["weight"], values["bias"], cases.prompts(("i",), K),
                             values["embedding"], image_token_id=cases.IMAGE_TOKEN)  # fmt: skip
    assert out.dtype == torch.float64


def test_inference_mode_and_no_grad(engine):
    values = cases.projection(2, K, D, E, torch.float32)
    leaves = [values[name].clone().requires_grad_() for name in ("features", "weight", "bias")]
    ids = cases.prompts(("it", "ti"), K)
    with torch.no_grad():
        out = _step(*leaves, ids, values["embedding"], None, backend=engine)
    with torch.inference_mode():
        assert torch.equal(_step(*leaves, ids, values["embedding"], None, backend=engine), out)
    assert not out.requires_grad


def test_frozen_call_saves_nothing(engine):
    values = cases.projection(2, K, D, E, torch.float32)
    ids = cases.prompts(("it", "ti"), K)
    with torch.autograd.graph.saved_tensors_hooks(pytest.fail, pytest.fail):
        out = _step(values["features"], values["weight"], None, ids, values["embedding"], None, backend=engine)
    assert out.grad_fn is None


def test_backward_runs_where_forward_ran(monkeypatch):
    names, select = [], dispatch.select
    monkeypatch.setattr(dispatch, "select", lambda *args: names.append(args[2]) or select(*args))
    values = cases.projection(1, K, D, E, torch.float32)
    weight = values["weight"].clone().requires_grad_()
    with dispatch.use_backend("eager"):
        out = _step(values["features"], weight, None, cases.prompts(("i",), K), values["embedding"], None)
    out.sum().backward()
    assert names == ["eager", "eager"]
