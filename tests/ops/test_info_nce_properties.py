"""hypothesis: any shape, layout and combination of options agrees with the reference, and obeys identities."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from limber_fast import info_nce
from limber_fast.reference.info_nce import info_nce as reference

# The engine fixture is the same for every example, so one per test function is right.
PROFILE = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SIZES = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 129]))


def _tensor(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def calls(draw):
    """(towers, options): arguments of one call that keeps the contract."""
    seed, n, d, k = draw(st.integers(0, 2**20)), draw(SIZES), draw(SIZES), draw(st.integers(0, 20))
    variant, symmetric = draw(st.sampled_from(["softmax", "sigmoid"])), draw(st.booleans())
    square = (variant == "softmax" and symmetric) or draw(st.booleans())
    m = n if square else draw(SIZES)
    generator = torch.Generator().manual_seed(seed)
    options = {"variant": variant, "symmetric": symmetric, "normalize": draw(st.booleans()),
               "reduction": draw(st.sampled_from(["mean", "sum", "none"])), "logit_scale": draw(st.floats(-20, 60)),
               "logit_bias": draw(st.one_of(st.none(), st.floats(-10, 10)))}  # fmt: skip
    if not square:
        options["labels"] = torch.randint(m, (n,), generator=generator)
    elif draw(st.booleans()):
        options["labels"] = torch.randperm(n, generator=generator)
    if draw(st.booleans()):
        kinds = draw(st.integers(1, 30))
        options["ids"] = tuple(torch.randint(kinds, (size,), generator=generator) for size in (n, m))
    if draw(st.booleans()):
        options["weights"] = torch.rand(n, generator=generator) + 0.1
    if variant == "softmax":
        options["label_smoothing"] = draw(st.sampled_from([0.0, 0.1, 0.9]))
    towers = {"image": _tensor(seed + 1, n, d), "text": _tensor(seed + 2, m, d)}
    if k:
        towers["extra_negatives"] = _tensor(seed + 3, k, d)
    return {name: x / d**0.5 for name, x in towers.items()}, options


LAYOUTS = {
    "plain": lambda x: x,
    "transposed": lambda x: x.T.contiguous().T,
    "strided rows": lambda x: x.repeat_interleave(3, dim=0)[::3],
    "slice": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
}


@PROFILE
@given(call=calls(), layout=st.sampled_from(list(LAYOUTS)), cache_mb=st.sampled_from([0, 0.01, 256]))
def test_agrees_with_the_reference(engine, call, layout, cache_mb):
    towers, options = call
    fused = {name: LAYOUTS[layout](x).detach().requires_grad_() for name, x in towers.items()}
    exact = {name: x.double().requires_grad_() for name, x in towers.items()}
    found = info_nce(**fused, **options, cache_mb=cache_mb, backend=engine)
    true = reference(**exact, **options)[0]
    magnitude = max(1.0, true.abs().max().item())
    torch.testing.assert_close(found.double(), true, rtol=1e-4, atol=1e-5 * magnitude)
    gradients = torch.autograd.grad(found.sum(), list(fused.values()), allow_unused=True)
    floor = 1.0 if options["normalize"] else 1e-2  # the gradient through a norm is a difference of larger numbers
    for x, y in zip(gradients, torch.autograd.grad(true.sum(), list(exact.values())), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-3, atol=1e-4 * max(y.abs().max().item(), floor))


@PROFILE
@given(n=SIZES, d=SIZES, seed=st.integers(0, 2**20))
def test_order_of_pairs_does_not_matter(engine, n, d, seed):
    image, text = _tensor(seed, n, d) / d**0.5, _tensor(seed + 1, n, d) / d**0.5
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    loss = info_nce(image, text, 10.0, reduction="none", backend=engine)
    shuffled = info_nce(image[order], text[order], 10.0, reduction="none", backend=engine)
    torch.testing.assert_close(shuffled, loss[order], rtol=1e-5, atol=1e-5)
    relabelled = info_nce(image, text[order], 10.0, labels=order.argsort(), reduction="none", backend=engine)
    torch.testing.assert_close(relabelled, loss, rtol=1e-5, atol=1e-5)


@PROFILE
@given(n=SIZES, m=SIZES, k=SIZES, d=SIZES, seed=st.integers(0, 2**20))
def test_extra_negatives_are_further_columns(engine, n, m, k, d, seed):
    image, text, extra = (_tensor(seed + i, rows, d) / d**0.5 for i, rows in enumerate((n, m, k)))
    options = {"labels": torch.arange(n) % m, "symmetric": False, "reduction": "none", "backend": engine}
    torch.testing.assert_close(
        info_nce(image, text, 10.0, extra_negatives=extra, **options),
        info_nce(image, torch.cat([text, extra]), 10.0, **options),
        rtol=1e-5,
        atol=1e-5,
    )


@PROFILE
@given(n=SIZES, d=SIZES, seed=st.integers(0, 2**20))
def test_masked_duplicates_are_as_if_absent(engine, n, d, seed):
    """Rows repeated under their own ids: each copy's row loss is that of the batch without copies."""
    image, text = _tensor(seed, n, d) / d**0.5, _tensor(seed + 1, n, d) / d**0.5
    once = info_nce(image, text, 10.0, symmetric=False, reduction="none", backend=engine)
    twice = info_nce(image, text.repeat(2, 1), 10.0, labels=torch.arange(n), symmetric=False, reduction="none",
                     ids=(torch.arange(n), torch.arange(2 * n) % n), backend=engine)  # fmt: skip
    # The other rows' copies stay: each negative counts double, log(1 + 2 e^u) against log(1 + e^u).
    others = torch.expm1(once.double())
    torch.testing.assert_close(twice.double(), torch.log1p(2 * others), rtol=1e-4, atol=1e-5)
