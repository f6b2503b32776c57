"""hypothesis: any prompts, shapes and options agree with the reference, and obey identities."""

from __future__ import annotations

import cases
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from limber_fast import project_concat
from limber_fast.reference.project_concat import project_concat as reference

# The engine fixture is the same for every example, so one per test function is right.
PROFILE = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SIZES = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 129, 257]))
ROWS = st.lists(st.text("ittt", min_size=1, max_size=6), min_size=1, max_size=5).map(tuple)
K = st.sampled_from([1, 2, 3, 16, 33])


def _call(rows, k, d, e, data, **options):
    generator = torch.Generator().manual_seed(data)
    features = torch.randn("".join(rows).count("i"), k, d, generator=generator)
    weight, bias = torch.randn(e, d, generator=generator) / d**0.5, torch.randn(e, generator=generator)
    embedding = torch.randn(cases.VOCABULARY, e, generator=generator)
    leaves = [x.requires_grad_() for x in (features, weight, bias)]
    ids = cases.prompts(rows, k, data)
    return leaves, (ids, embedding), {"image_token_id": cases.IMAGE_TOKEN, **options}


@PROFILE
@given(rows=ROWS, k=K, d=SIZES, e=SIZES, seed=st.integers(0, 2**20), p=st.sampled_from([0.0, 0.1, 0.9]),
       norm=st.booleans())  # fmt: skip
def test_agrees_with_the_reference(engine, rows, k, d, e, seed, p, norm):
    options = {"dropout_p": p, "seed": seed, "layer_norm": (None, None, 0.1) if norm else None}
    leaves, rest, options = _call(rows, k, d, e, seed, **options)
    found = project_concat(*leaves, *rest, **options, backend=engine)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    true = reference(*exact, rest[0], rest[1].double(), **options)
    torch.testing.assert_close(found.double(), true, rtol=1e-4, atol=1e-4)
    if not true.requires_grad:  # text alone
        return
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(seed + 1))
    gradients = zip(torch.autograd.grad(found, leaves, grad), torch.autograd.grad(true, exact, grad.double()),
                    strict=True)  # fmt: skip
    for x, y in gradients:
        torch.testing.assert_close(
            x.double(), y, rtol=1e-3, atol=1e-4 * max(y.abs().max().item() if y.numel() else 0, 1)
        )


@PROFILE
@given(rows=ROWS, k=K, d=SIZES, e=SIZES, seed=st.integers(0, 2**20))
def test_each_prompt_is_its_own(engine, rows, k, d, e, seed):
    """A batch holds what its prompts give one by one, whatever else is in it."""
    leaves, (ids, embedding), options = _call(rows, k, d, e, seed)
    batch = project_concat(*leaves, ids, embedding, **options, backend=engine).detach()
    images = leaves[0].detach().split([row.count("i") for row in rows])
    for line, (row, own) in enumerate(zip(ids, images, strict=True)):
        alone = project_concat(own, *leaves[1:], row[None], embedding, **options, backend=engine).detach()
        torch.testing.assert_close(alone[0], batch[line], rtol=1e-5, atol=1e-5)


@PROFILE
@given(rows=ROWS, k=K, d=SIZES, e=SIZES, seed=st.integers(0, 2**20))
def test_gradient_is_the_adjoint(engine, rows, k, d, e, seed):
    """<grad, out(W + dW) - out(W)> = <d_weight, dW>: the op is linear in its weight."""
    (features, weight, bias), rest, options = _call(rows, k, d, e, seed)
    features, bias = features.detach(), bias.detach()
    out = project_concat(features, weight, bias, *rest, **options, dropout_p=0.3, seed=seed, backend=engine)
    generator = torch.Generator().manual_seed(seed + 2)
    grad, change = (torch.randn(x.shape, generator=generator) for x in (out, weight))
    (d_weight,) = torch.autograd.grad(out, weight, grad)
    moved = project_concat(features, (weight + change).detach(), bias, *rest, **options, dropout_p=0.3, seed=seed,
                           backend=engine)  # fmt: skip
    direct, adjoint = (grad.double() * (moved.double() - out.double())).sum(), (d_weight.double() * change).sum()
    scale = 1 + grad.norm() * change.norm() * features.norm()
    assert (direct - adjoint).abs() <= 1e-5 * scale
