"""`train-clip --micro-batch`: a batch in several passes has the loss and the gradients of the whole."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("open_clip")

from test_train_clip import SMALL, TINY

from limber_fast import train_clip
from limber_fast.train_limber import kept_for_backward, pairs_of
from limber_fast.training import clip
from limber_fast.training.clip_config import ClipTrainConfig


def gradients(rank, size, settings):
    """{name: gradient}, running statistics and the loss of one step from the first weights."""
    config = ClipTrainConfig(**settings)
    trainer = train_clip.build_trainer(config, pairs_of(config))
    trainer.model.train()
    batch, _ = next(trainer.batches())
    loss = trainer.train_step(batch)["loss"]
    return {name: p.grad for name, p in trainer.model.named_parameters()}, dict(trainer.model.named_buffers()), loss


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_gradients_of_a_batch_in_passes_are_those_of_the_whole(ranks, tmp_path, loss):
    # In passes of 2: 11 pairs are five and a half of one process, or 6 and 5 of two, three each. No random numbers.
    model = json.loads(json.dumps(TINY))
    del model["vision_cfg"]["patch_dropout"]
    path = tmp_path / "plain-clip.json"
    path.write_text(json.dumps(model))
    settings = {**SMALL, "model": str(path), "loss": loss, "batch_size": 11, "grad_clip": 0.0}
    ((expected, _, value),) = ranks.run(1, gradients, settings)
    for size in (1, 2):
        for micro in (2, 4):
            for found, _, mine in ranks.run(size, gradients, {**settings, "micro_batch": micro}):
                assert mine == pytest.approx(value, rel=1e-6)
                for name, x in expected.items():
                    assert (found[name] - x).norm() <= 1e-6 * max(x.norm(), 1e-6), (size, micro, name)


@pytest.mark.parametrize("vision", [
    TINY["vision_cfg"],  # dropped patches
    {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8},  # running statistics
])  # fmt: skip
def test_a_pass_made_again_is_the_first_one(tmp_path, monkeypatch, vision):
    path = tmp_path / f"passes-{len(vision)}-clip.json"
    path.write_text(json.dumps({**TINY, "vision_cfg": vision}))
    settings = {**SMALL, "model": str(path), "micro_batch": 4, "precision": "bf16", "grad_clip": 0.0}
    found, statistics, loss = gradients(0, 1, settings)
    # The graphs of all passes kept: what is not made twice cannot differ.
    monkeypatch.setattr(clip, "checkpoint", lambda one_pass, *part, **_: one_pass(*part))
    expected, expected_statistics, expected_loss = gradients(0, 1, settings)
    assert loss == expected_loss and all(torch.equal(x, found[name]) for name, x in expected.items())
    assert all(torch.equal(x, statistics[name]) for name, x in expected_statistics.items())


def test_passes_keep_the_activations_of_one(tmp_path):
    (tmp_path / "kept-clip.json").write_text(json.dumps(TINY))
    config = ClipTrainConfig(**SMALL, model=str(tmp_path / "kept-clip.json"))
    trainer = train_clip.build_trainer(config, pairs_of(config))
    images, tokens, _ = next(trainer.batches())[0]
    held = {}
    for micro in (0, 2):
        trainer.features.micro_batch = micro
        with kept_for_backward((*trainer.model.parameters(), images, tokens)) as kept:
            out = trainer.features(images, tokens)
        held[micro] = sum(kept.values())
        del out
    assert held[0] > 100 * held[2]
