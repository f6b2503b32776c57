"""torch.library registration, torch.compile and autocast."""

from __future__ import annotations

import cases
import pytest
import torch

from limber_fast import dispatch, info_nce, use_backend

FORWARD, BACKWARD = torch.ops.limber_fast.info_nce_fwd.default, torch.ops.limber_fast.info_nce_bwd.default
N, M, D = 9, 11, 5

CALLS = {  # label_smoothing, normalize, variant, symmetric, reduction
    "symmetric": ((0.0, False, "softmax", True, "mean"), set()),
    "symmetric with everything": (
        (0.1, True, "softmax", True, "sum"),
        {"bias", "extra", "labels", "ids", "weights", "stats"},
    ),
    "rectangular": ((0.1, False, "softmax", False, "none"), {"labels", "ids", "stats"}),
    "sigmoid": ((0.0, True, "sigmoid", False, "mean"), {"bias", "labels", "weights"}),
}


def _arguments(engine: str, call: str, requires_grad: bool, cache_bytes: int = 0) -> tuple:
    options, given = CALLS[call]
    m = N if options[3] else M

    def leaf(*shape):
        return torch.randn(shape).requires_grad_(requires_grad)

    return (
        leaf(N, D), leaf(m, D), leaf(), leaf() if "bias" in given else None, leaf(3, D) if "extra" in given else None,
        torch.randperm(m)[:N].int() if "labels" in given else None,
        *((torch.arange(N).int() // 2, torch.arange(m).int() // 2) if "ids" in given else (None, None)),
        torch.rand(N) if "weights" in given else None, *options, "stats" in given, cache_bytes, engine,
    )  # fmt: skip


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_opcheck_forward(engine, call, requires_grad):
    # The cache is scratch memory that only its own backend reads: opcheck, which compares outputs, runs without it.
    torch.library.opcheck(FORWARD, _arguments(engine, call, requires_grad))


@pytest.mark.parametrize("needs", [[True] * 5, [False, True, True, False, False]])
@pytest.mark.parametrize("call", CALLS)
def test_opcheck_backward(engine, call, needs):
    arguments = _arguments(engine, call, False)
    loss, row, col, _, _, cache = FORWARD(*arguments)
    needs = [need and x is not None for need, x in zip(needs, arguments[:5], strict=True)]
    torch.library.opcheck(
        BACKWARD, (torch.ones_like(loss), *arguments[:9], row, col, cache, *arguments[9:14], engine, needs)
    )


def test_opcheck_index_ops():
    torch.library.opcheck(torch.ops.limber_fast.info_nce_labels.default, (torch.randperm(5), 5, True))
    torch.library.opcheck(torch.ops.limber_fast.info_nce_ids.default, (torch.arange(5), torch.arange(7) * 2**40))


def test_fake_cache_has_the_size_of_the_real_one(engine):
    arguments = _arguments(engine, "symmetric", True, cache_bytes=12345)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        fake = FORWARD(*arguments)
    for found, real in zip(fake, FORWARD(*arguments), strict=True):
        assert (found.shape, found.stride(), found.dtype) == (real.shape, real.stride(), real.dtype)


def _step(image, text, scale, **options):
    loss = info_nce(image * 1.5, text, scale, **options)
    return (loss[0] if isinstance(loss, tuple) else loss) * 2


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_whole_graph_with_dynamic_shapes(engine, compiler):
    torch._dynamo.reset()
    compiled = torch.compile(_step, fullgraph=True, dynamic=True, backend=compiler)
    scale = torch.tensor(9.0, requires_grad=True)
    for n in (9, 17, 33):
        leaves = [x.clone().requires_grad_() for x in cases.towers("unit", n, n, D, torch.float32)[:2]] + [scale]
        labels, ids = cases.permutation(n), torch.arange(n) // 2
        for options in ({}, {"labels": labels, "ids": ids, "label_smoothing": 0.1, "return_stats": True}):
            results = []
            for function in (compiled, _step):
                loss = function(*leaves, **options, backend=engine)
                results.append((loss, *torch.autograd.grad(loss, leaves)))
            for found, true in zip(*results, strict=True):
                torch.testing.assert_close(found, true)


def test_compiled_function_follows_use_backend(monkeypatch):
    names, select = [], dispatch.select
    monkeypatch.setattr(dispatch, "select", lambda *args: names.append(args[2]) or select(*args))
    torch._dynamo.reset()
    compiled = torch.compile(_step, fullgraph=True, backend="eager")
    towers = cases.towers("unit", N, N, D, torch.float32)
    compiled(*towers)
    with use_backend("eager"):
        compiled(*towers)
    compiled(*towers)
    assert names == ["auto", "eager", "auto"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_treats_towers_as_a_product_does(engine, dtype):
    image, text, scale = cases.towers("unit", 123, 123, 64, torch.float32)
    leaves = [image.clone().requires_grad_(), text.to(dtype).requires_grad_()]  # as an encoder under autocast returns
    scale = torch.tensor(scale, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        loss = info_nce(*leaves, scale, extra_negatives=image[:7], backend=engine)
    loss.backward()
    cast = [image.to(dtype).requires_grad_(), text.to(dtype).requires_grad_()]
    same = info_nce(*cast, scale.detach(), extra_negatives=image[:7].to(dtype), backend=engine)
    same.backward()
    assert loss.dtype == torch.float32 and torch.equal(loss, same)
    assert [x.grad.dtype for x in (*leaves, scale)] == [torch.float32, dtype, torch.float32]
    assert torch.equal(leaves[0].grad, cast[0].grad.float()) and torch.equal(leaves[1].grad, cast[1].grad)


def test_autocast_leaves_float64_alone():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert info_nce(*torch.randn(2, 4, 3, dtype=torch.float64), 1.0).dtype == torch.float64


def test_inference_mode_and_no_grad(engine):
    towers = [x.clone().requires_grad_() for x in cases.towers("unit", N, N, D, torch.float32)[:2]]
    with torch.no_grad():
        loss = info_nce(*towers, 9.0, backend=engine)
    with torch.inference_mode():
        assert torch.equal(info_nce(*towers, 9.0, backend=engine), loss)
    assert not loss.requires_grad
