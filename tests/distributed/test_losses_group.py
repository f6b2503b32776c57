"""ClipLoss and SigLipLoss over real processes: beside open_clip's own, and under DDP."""

from __future__ import annotations

import cases
import pytest
import torch
from shares import leaves, own_rows
from torch import nn

import limber_fast
from limber_fast.reference.info_nce import info_nce as reference


def constructors(rank, size):
    for arguments, message in (
        ({"world_size": 3, "rank": rank}, "world_size and rank must be those of the group"),
        ({"world_size": 2, "rank": 1 - rank}, "world_size and rank must be those of the group"),
        ({"world_size": 2, "rank": rank, "use_horovod": True}, "use_horovod must be False"),
    ):
        with pytest.raises(ValueError, match=message):
            limber_fast.ClipLoss(**arguments)
    assert "world_size=2" in repr(limber_fast.ClipLoss(world_size=2, rank=rank))
    assert limber_fast.ClipLoss().group is None  # a group nobody asked for changes nothing
    return True


def test_constructors(ranks):
    assert ranks.run(2, constructors) == [True, True]


def beside_open_clip(rank, size, name, arguments, n, bias):
    import open_clip.loss

    image, text, scale = cases.towers("unit", n * size, n * size, 24, torch.float32)
    own = own_rows([n] * size, rank)
    results = []
    for module in (limber_fast, open_clip.loss):
        inputs = leaves(image[own], text[own], scale, *([] if bias is None else [bias]))
        loss = getattr(module, name)(rank=rank, world_size=size, **arguments)
        value = loss(*inputs, *([None] if bias is None else []), output_dict=True)["contrastive_loss"]
        results.append((value.detach(), torch.autograd.grad(value, inputs, allow_unused=True)))
    return results


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name, arguments, bias", [
    ("ClipLoss", {"local_loss": False, "gather_with_grad": True}, None),
    ("ClipLoss", {"local_loss": True, "gather_with_grad": True, "cache_labels": True}, None),
    ("SigLipLoss", {"dist_impl": "bidir"}, -10.0),
    ("SigLipLoss", {"dist_impl": "gather"}, -10.0),
])  # fmt: skip
def test_equal_to_open_clip(ranks, size, name, arguments, bias):
    """Towers rank by rank; loss and scale, of which open_clip may return a rank's share, by their mean over ranks."""
    pytest.importorskip("open_clip")
    results = ranks.run(size, beside_open_clip, name, arguments, 21, bias)
    for k in range(2 if bias is None else 3):
        mean = sum(theirs[1][k] if k > 1 else theirs[0] for _, theirs in results) / size
        for mine, theirs in results:
            if k < 2:
                torch.testing.assert_close(mine[1][k], theirs[1][k], rtol=2e-5, atol=2e-6)
            torch.testing.assert_close(mine[1][k] if k > 1 else mine[0], mean, rtol=2e-5, atol=2e-6)


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.image, self.text = nn.Linear(12, 10), nn.Linear(9, 10, bias=False)
        self.logit_scale, self.logit_bias = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.tensor(-2.0))
        for parameter in (self.image.weight, self.image.bias, self.text.weight):
            parameter.data = torch.randn(parameter.shape, generator=generator) / 3

    def forward(self, images, texts):
        return self.image(images), self.text(texts), self.logit_scale.exp(), self.logit_bias


def samples(n):
    generator = torch.Generator().manual_seed(4)
    return torch.randn(n, 12, generator=generator), torch.randn(n, 9, generator=generator)


def ddp_step(rank, size, name, sizes, theirs):
    module = limber_fast
    if theirs:
        import open_clip.loss as module
    own = own_rows(sizes, rank)
    model = nn.parallel.DistributedDataParallel(TwoTowers())
    image, text, scale, bias = model(*(x[own] for x in samples(sum(sizes))))
    with_grad = {"gather_with_grad": True} if name == "ClipLoss" else {}
    loss = getattr(module, name)(rank=rank, world_size=size, **with_grad)
    loss(image, text, scale, bias).backward()
    return {name: p.grad for name, p in model.module.named_parameters()}


@pytest.mark.parametrize("name, variant", [("ClipLoss", "softmax"), ("SigLipLoss", "sigmoid")])
@pytest.mark.parametrize("sizes", [(16, 16), (16, 5), (8, 9, 1)], ids=str)
def test_ddp_gives_the_gradient_of_one_process(ranks, name, variant, sizes):
    model = TwoTowers().double()
    image, text, scale, bias = model(*(x.double() for x in samples(sum(sizes))))
    reference(image, text, scale, logit_bias=bias, variant=variant)[0].backward()
    for found in ranks.run(len(sizes), ddp_step, name, sizes, False):
        for key, parameter in model.named_parameters():
            if variant == "softmax" and key == "logit_bias":
                assert found[key] == 0
            else:
                assert max(cases.errors(found[key], parameter.grad)) <= 1e-6, key
    if len(set(sizes)) == 1:
        pytest.importorskip("open_clip")
        mine, theirs = (ranks.run(len(sizes), ddp_step, name, sizes, who) for who in (False, True))
        for a, b in zip(mine, theirs, strict=True):
            for key in a:
                torch.testing.assert_close(a[key], b[key], rtol=2e-5, atol=2e-6)
