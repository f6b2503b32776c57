"""info_nce over groups of real processes, against one process in float64."""

from __future__ import annotations

import re

import cases
import pytest
import torch
import torch.distributed as dist
from poisoning import poison
from shares import leaves, own_rows

import limber_fast
from limber_fast.reference.info_nce import info_nce as reference

ENGINES = [("eager", torch.float64), ("eager", torch.float32), ("cpu", torch.float32), ("cpu", torch.bfloat16)]
SIZES = [(33, 33), (50, 7), (1, 90), (40, 1, 61)]
ROWS = {"ids": lambda n: cases.labels(n, max(2, n // 2)), "weights": lambda n: (cases.permutation(n) + 1) / n}
OPTIONS = {
    "plain": {}, "ids": {"rows": ["ids"]}, "weights": {"rows": ["weights"]}, "smoothing": {"label_smoothing": 0.1},
    "sum": {"reduction": "sum"}, "everything": {"rows": ["ids", "weights"], "label_smoothing": 0.2, "normalize": True},
    "sigmoid": {"variant": "sigmoid"}, "sigmoid everything": {"variant": "sigmoid", "rows": ["ids"], "normalize": True},
}  # fmt: skip
BIAS = -3.0


def towers(data, sizes, d, dtype):
    return cases.towers(data, sum(sizes), sum(sizes), d, dtype)


def options_of(options, n):
    options = dict(options)
    return {**{name: ROWS[name](n) for name in options.pop("rows", [])}, **options}


def on_rank(rank, size, engine, dtype, data, sizes, d, options, cache_mb):
    """Loss, states and gradients of a rank; then the same with frozen towers and without any gradient."""
    image, text, scale = towers(data, sizes, d, dtype)
    own = own_rows(sizes, rank)
    options = {k: v[own] if isinstance(v, torch.Tensor) else v for k, v in options_of(options, sum(sizes)).items()}
    options |= {"group": dist.group.WORLD, "backend": engine, "cache_mb": cache_mb}
    inputs = leaves(image[own], text[own], scale, BIAS)
    with pytest.MonkeyPatch.context() as patch:
        poison(patch)
        loss = limber_fast.info_nce(*inputs[:3], logit_bias=inputs[3], **options)
        gradients = torch.autograd.grad(loss, inputs)
        _, stats = limber_fast.info_nce(*inputs[:3], logit_bias=inputs[3], return_stats=True, **options)
        frozen = limber_fast.info_nce(image[own], *inputs[1:3], logit_bias=BIAS, **options)
        (d_text,) = torch.autograd.grad(frozen, inputs[1:2])
        with torch.no_grad():
            bare = limber_fast.info_nce(*inputs[:3], logit_bias=inputs[3], **options)
    assert torch.equal(d_text, gradients[1]) and torch.equal(bare, loss) and torch.equal(frozen, loss)
    assert bare.grad_fn is None
    return loss.detach(), gradients, stats.loss_per_row, (stats.image_accuracy, stats.text_accuracy)


def eager_errors(data, sizes, d, dtype, variant):
    """Of eager PyTorch in one process, in `dtype`: loss and gradients."""
    image, text, scale = towers(data, sizes, d, dtype)
    results = []
    for to in (dtype, torch.float64):
        inputs = leaves(image.to(to), text.to(to), scale, BIAS)
        loss = cases.eager_info_nce(*inputs[:3], logit_bias=inputs[3], variant=variant).mean()
        results.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
    return [max(cases.errors(*pair)) for pair in zip(*results, strict=True)]


def check(ranks, engine, dtype, data, sizes, d, options, cache_mb=256):
    """Gradients of all ranks' rows together: within the floor of the dtype, or twice the error of eager PyTorch."""
    image, text, scale = towers(data, sizes, d, dtype)
    variant = options.get("variant", "softmax")
    true = leaves(image.double(), text.double(), scale, BIAS)
    loss, stats = reference(*true[:3], logit_bias=true[3], **options_of(options, sum(sizes)))
    exact = [loss.detach(), *torch.autograd.grad(loss, true)]
    results = ranks.run(len(sizes), on_rank, engine, dtype, data, sizes, d, options, cache_mb)
    d_image, d_text = (torch.cat([gradients[k] for _, gradients, *_ in results]) / len(sizes) for k in (0, 1))
    eager = eager_errors(data, sizes, d, dtype, variant)
    for rank, (value, (_, _, d_scale, d_bias), per_row, _) in enumerate(results):
        assert torch.equal(value, results[0][0]) and torch.equal(d_scale, results[0][1][2])
        found = [value, d_image, d_text, d_scale, *([d_bias] if variant == "sigmoid" else [])]
        assert variant == "sigmoid" or d_bias == 0
        for name, *pair, theirs in zip(("loss", "image", "text", "scale", "bias"), found, exact, eager, strict=False):
            assert max(cases.errors(*pair)) <= max(cases.FLOOR[dtype], 2 * theirs), (name, rank)
        per_row_true = stats["loss_per_row"].detach()[own_rows(sizes, rank)]
        tolerance = 10 * cases.FLOOR[dtype]
        torch.testing.assert_close(per_row.double(), per_row_true, rtol=tolerance, atol=tolerance)
    for k, name in enumerate(["image_accuracy", "text_accuracy"]):
        if stats[name] is not None:
            shares = [float(a[k]) * n for (*_, a), n in zip(results, sizes, strict=True)]
            assert sum(shares) / sum(sizes) == pytest.approx(float(stats[name]), abs=1e-6)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("engine, dtype", ENGINES, ids=str)
def test_every_option_against_one_process(ranks, engine, dtype, sizes):
    for options in OPTIONS.values():
        check(ranks, engine, dtype, "unit", sizes, 37, options)


@pytest.mark.parametrize("data", ["below", "converged", "offset", "opposed"])
@pytest.mark.parametrize("engine", ["eager", "cpu"])
def test_hard_logits(ranks, engine, data):
    """Scale 100: each rank's slab has other maxima than the columns it shares with other slabs."""
    check(ranks, engine, torch.float32, data, (100, 50), 48, {}, cache_mb=0)


def subgroups(rank, size, sizes):
    groups = [dist.new_group([0, 2]), dist.new_group([1])]
    mine = groups[rank == 1]
    image, text, scale = cases.towers("unit", sum(sizes), sum(sizes), 16, torch.float32)
    own = own_rows(sizes, rank)
    inputs = leaves(image[own], text[own], scale)
    loss = limber_fast.ClipLoss(group=mine)(*inputs)
    with pytest.raises(ValueError, match="ClipLoss: group must be one that this process belongs to"):
        limber_fast.ClipLoss(group=groups[rank != 1])
    return loss.detach(), torch.autograd.grad(loss, inputs)


def test_groups_side_by_side(ranks):
    sizes = (9, 20, 14)
    image, text, scale = cases.towers("unit", sum(sizes), sum(sizes), 16, torch.float64)
    results = ranks.run(3, subgroups, sizes)
    for members in ([0, 2], [1]):
        rows = torch.cat([torch.arange(sum(sizes))[own_rows(sizes, rank)] for rank in members])
        true = leaves(image[rows], text[rows], scale)
        loss, _ = reference(*true)
        gradients = torch.autograd.grad(loss, true)
        for k in (0, 1):
            found = torch.cat([results[rank][1][k] for rank in members]) / len(members)
            assert max(cases.errors(found, gradients[k])) <= 1e-6
        for rank in members:
            assert max(cases.errors(results[rank][0], loss.detach())) <= 1e-6
            assert max(cases.errors(results[rank][1][2], gradients[2])) <= 1e-6


def one_group_of_two(rank, size):
    group = dist.new_group([0, 1])
    if rank == 2:
        return None  # nothing is asked of it
    x = torch.eye(4)
    loss = limber_fast.SigLipLoss(group=group)(x.requires_grad_(), x, 2.0, -1.0)
    if rank == 1:
        loss.backward()  # sends nothing: rank 0 is not waited for
    return float(loss)


def test_processes_outside_a_group_are_left_alone(ranks):
    first, second, third = ranks.run(3, one_group_of_two)
    assert first == second and third is None


BAD = {
    "D": ({"d": 9}, "ValueError: info_nce: D must be the same on every rank of the group; got 8 on group rank 0, 9 on"),
    "dtype": ({"dtype": torch.bfloat16}, "TypeError: info_nce: dtype must be the same .* got torch.float32 on group"),
    "smoothing": ({"label_smoothing": 0.25}, "ValueError: info_nce: label_smoothing must be the same .* 0 .* 0.25 on"),
    "ids": ({"ids": torch.arange(4)}, "ValueError: info_nce: ids must be the same .* none on group rank 0, some on"),
}  # fmt: skip
LONELY = {
    "a vector": (torch.zeros(4), {}, "image must be \\[N, D\\]"),
    "labels": (torch.eye(4), {"labels": torch.arange(4)}, "labels must not be combined with group="),
    "reduction": (torch.eye(4), {"reduction": "none"}, "reduction='none' must not be combined with group="),
    "direction": (torch.eye(4), {"symmetric": False}, "symmetric=False must not be combined with group="),
    "sigmoid": (torch.eye(4), {"variant": "sigmoid", "weights": torch.ones(4)}, "weights with variant='sigmoid' must"),
    "no rows": (torch.zeros(0, 4), {}, "at least one row"),
}  # fmt: skip


def errors_of(rank, size):
    """Every error as each rank saw it, and the loss of a right call after each."""
    found = {}

    def attempt(name, *arguments, **options):
        try:
            limber_fast.info_nce(*arguments, group=dist.group.WORLD, **options)
        except (TypeError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"
        found[name, "after"] = float(limber_fast.info_nce(torch.eye(4), torch.eye(4), 3.0, group=dist.group.WORLD))

    for name, (wrong, _) in BAD.items():
        wrong = wrong if rank == 1 else {}
        x = torch.ones(4, wrong.get("d", 8), dtype=wrong.get("dtype", torch.float32))
        attempt(name, x, x, 1.0, **{k: v for k, v in wrong.items() if k not in ("d", "dtype")})
    for name, (x, options, _) in LONELY.items():
        lonely = (x, x, 1.0) if rank == 1 else (torch.eye(4), torch.eye(4), 1.0)
        attempt(name, *lonely, **(options if rank == 1 else {}))
    return found


def test_errors_reach_every_rank(ranks):
    results = ranks.run(3, errors_of)
    after = {v for found in results for k, v in found.items() if isinstance(k, tuple)}
    assert len(after) == 1
    for rank, found in enumerate(results):
        for name, (_, message) in BAD.items():
            assert re.search(message, found[name])
        for name, (_, _, message) in LONELY.items():
            others = "ValueError: info_nce: the arguments must be right on every rank .* got an error on group rank 1"
            assert re.search(message if rank == 1 else others, found[name])


def saved_bytes(rank, size, n, d):
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    image, text, scale = cases.towers("unit", n, n, d, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = limber_fast.ClipLoss(world_size=size, rank=rank, cache_mb=0)(*leaves(image, text, scale))
    loss.backward()
    return sum(kept.values())


def test_a_rank_keeps_two_gathered_towers_and_a_few_numbers_a_row(ranks):
    n, d, size = 512, 8, 2
    towers_and_gathered = 4 * (2 * n * d + 2 * size * n * d)
    for found in ranks.run(size, saved_bytes, n, d):
        assert found <= towers_and_gathered + 4 * 30 * size * n


def compiled(rank, size):
    loss, inputs = limber_fast.ClipLoss(group=dist.group.WORLD), leaves(*cases.towers("unit", 9, 9, 8, torch.float32))

    def function(image, text, scale):
        return loss(2 * image, 2 * text, scale.sqrt())

    return [torch.autograd.grad(f(*inputs), inputs) for f in (function, torch.compile(function, backend="eager"))]


def test_torch_compile_breaks_the_graph_and_goes_on(ranks):
    for plain, through_compile in ranks.run(2, compiled):
        assert all(torch.equal(a, b) for a, b in zip(plain, through_compile, strict=True))


def differentiated_twice(rank, size):
    image, text, scale = leaves(*cases.towers("unit", 5, 5, 8, torch.float32))
    loss = limber_fast.info_nce(image, text, scale, group=dist.group.WORLD)
    with pytest.raises(RuntimeError, match="info_nce: over a group its gradient cannot be differentiated"):
        torch.autograd.grad(loss, image, create_graph=True)
    return len(torch.autograd.grad(loss, (image, text, scale)))


def test_its_gradient_is_not_differentiated(ranks):
    assert ranks.run(2, differentiated_twice) == [3, 3]
