"""LiMBeR's training on real picture files: what a step is, features, resuming, what is tuned, shards."""

import dataclasses
import io
import os
import tarfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("timm")

from PIL import Image

from limber_fast import GPTJ, Limber
from limber_fast.models.encoders import encoder
from limber_fast.train_limber import activation_bytes, build, pairs_of
from limber_fast.training.checkpoint import LIMBER, load_checkpoint
from limber_fast.training.limber import LimberTrainer, linear_decay
from limber_fast.training.limber_data import cached_features


def trainer_of(config, cached=True):
    limber, pairs = build(config), pairs_of(config)
    out = Path(config.output)
    out.mkdir(exist_ok=True)
    features = cached_features(limber, pairs, out, "key") if cached else None
    trainer = LimberTrainer(limber, pairs, config, features)
    limber.train()
    return trainer


def test_features_are_the_encoders_and_broken_pictures_are_named(config):
    trainer = trainer_of(config)
    features = trainer.features
    assert features.rows == list(range(9)) and features.values.shape[0] == 10
    assert len(features.skipped) == 1 and "9.jpg" in features.skipped[0]
    plain = encoder("timm:test_resnet", weights=None, seed=0)
    image = Image.open(os.path.join(config.data, "images/0/3.jpg"))
    expected = plain(plain.pixels([image]))[0]
    torch.testing.assert_close(features.values[3].float(), expected, atol=0.02, rtol=0.02)
    written = os.stat(os.path.join(config.output, "features.bin")).st_mtime_ns
    again = trainer_of(config)
    assert os.stat(os.path.join(config.output, "features.bin")).st_mtime_ns == written
    assert torch.equal(again.features.values, features.values)


def test_it_learns(config):
    """As far as a language model with random weights can be steered."""
    config = dataclasses.replace(config, steps=150, batch_size=9, micro_batch=9, dropout=0.0)
    trainer = trainer_of(config)
    losses = [trainer.train_step()["loss"] for _ in range(config.steps)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_a_step_is_micro_batches_added_up(config):
    config = dataclasses.replace(config, dropout=0.0)
    whole = trainer_of(dataclasses.replace(config, micro_batch=6))
    parts = trainer_of(dataclasses.replace(config, micro_batch=2))
    a, b = whole.train_step(), parts.train_step()
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=0.02)


def test_the_schedule_is_limbers():
    assert linear_decay(0, 100, 15000) == pytest.approx(0.01) and linear_decay(99, 100, 15000) == 1
    assert linear_decay(14999, 100, 15000) == pytest.approx(1 / 14900)
    assert linear_decay(7550, 100, 15000) == pytest.approx(0.5)


def test_resumes_bit_for_bit(config):
    straight = trainer_of(config)
    for _ in range(6):
        straight.train_step()
    first = trainer_of(config)
    for _ in range(3):
        first.train_step()
    first.save(Path(config.output))
    second = trainer_of(config)
    second.restore(load_checkpoint(Path(config.output) / "checkpoint.pt", LIMBER))
    for _ in range(3):
        second.train_step()
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters, second.parameters, strict=True))
    with pytest.raises(ValueError, match=r"learning_rate was 0\.005 in the checkpoint; got 0\.1"):
        trainer_of(dataclasses.replace(config, learning_rate=0.1)).restore(
            load_checkpoint(Path(config.output) / "checkpoint.pt", LIMBER)
        )


def test_what_was_skipped_survives_a_kill(config):
    """Of a killed run there are files alone; the broken picture comes once in the first epoch, ahead of step 3."""
    config = dataclasses.replace(config, cache_features=False, save_every=2, steps=3)
    out = Path(config.output)

    def killed(step, values):
        if step == 3:
            raise KeyboardInterrupt

    first = trainer_of(config, cached=False)
    with pytest.raises(KeyboardInterrupt):
        first.run(out, killed)
    state = load_checkpoint(out / "checkpoint.pt", LIMBER)
    told = (out / "skipped.txt").read_text()
    assert state["step"] == 2 and list(state["skipped"]) == [9] and "9.jpg" in told and told.count("\n") == 1
    (out / "skipped.txt").unlink()
    second = trainer_of(config, cached=False)
    second.restore(state)
    assert second.skipped == first.skipped
    second.save(out)
    assert (out / "skipped.txt").read_text() == told
    del state["skipped"]  # as checkpoints were before they had it
    third = trainer_of(config, cached=False)
    third.restore(state)
    assert third.run(out) and third.step == 3


def test_a_tuned_encoder_moves_at_its_own_rate(config):
    trainer = trainer_of(dataclasses.replace(config, encoder_learning_rate=1e-4, cache_features=False), cached=False)
    before = [p.clone() for p in trainer.limber.encoder.parameters()]
    trainer.train_step()
    moved = [(a - b).abs().max().item() for a, b in zip(before, trainer.limber.encoder.parameters(), strict=True)]
    assert max(moved) > 0 and max(moved) < 2e-4
    assert not any(p.requires_grad for p in trainer.limber.language_model.parameters())


def test_shards_train_as_the_folder_does(config, tmp_path):
    """The same pictures and captions in two tar files: the same batches, the same losses."""
    data = Path(config.data)
    for shard in range(2):
        with tarfile.open(tmp_path / f"cc3m-{shard:05d}.tar", "w") as file:
            for i in range(5 * shard, 5 * shard + 5):
                file.add(data / f"images/0/{i}.jpg", f"{i:05d}.jpg")
                entry = (data / f"image_data/0/{i}.json").read_bytes()
                member = tarfile.TarInfo(f"{i:05d}.json")
                member.size = len(entry)
                file.addfile(member, io.BytesIO(entry))
    ours = trainer_of(dataclasses.replace(config, data=str(tmp_path / "cc3m-{00000..00001}.tar")), cached=False)
    theirs = trainer_of(config, cached=False)
    for _ in range(3):
        assert ours.train_step()["loss"] == theirs.train_step()["loss"]
    assert next(iter(ours.skipped.values())).startswith("cc3m-00001.tar: 00009")


def test_adapters_are_trained_saved_and_resumed(config, tmp_path):
    config = dataclasses.replace(config, adapters=16, layer_norm=True, steps=4, grad_checkpointing=True)
    trainer = trainer_of(config)
    adapters = trainer.limber.language_model.adapters
    before = [p.clone() for p in adapters.parameters()]
    assert all(p.dtype == torch.float32 and p.requires_grad for p in before)
    trainer.train_step()
    trainer.train_step()
    assert all(not torch.equal(a, b) for a, b in zip(before, adapters.parameters(), strict=True))
    trainer.save(tmp_path / "out")
    other = trainer_of(dataclasses.replace(config, grad_checkpointing=False))
    other.restore(load_checkpoint(tmp_path / "out" / "checkpoint.pt", LIMBER))
    for x in (trainer, other):
        x.train_step()
    for a, b in zip(trainer.parameters, other.parameters, strict=True):
        assert torch.equal(a, b)
    trainer.limber.save_pretrained(tmp_path / "map")
    again = Limber.from_pretrained(tmp_path / "map", GPTJ.from_pretrained(config.language_model), encoder=None)
    for a, b in zip(again.language_model.adapters.parameters(), adapters.parameters(), strict=True):
        assert torch.equal(a, b.to(a.dtype)) and not a.requires_grad
    trainer.limber.language_model.save_pretrained(tmp_path / "lm")
    (tmp_path / "lm" / "tokenizer.json").write_bytes((Path(config.language_model) / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match="adapters must be 16, as the language model's; got 8"):
        build(dataclasses.replace(config, language_model=str(tmp_path / "lm"), adapters=8,
                                  tokenizer=config.language_model))  # fmt: skip


def test_activation_bytes_grow_with_the_blocks(config):
    """GPT-J keeps for each block and token: x, q|k|v, attention's output and statistics, and the MLP's pre-activation,
    at most 2 x 4 E + 2 x 4 E bytes and a little in bf16."""
    trainer = trainer_of(config)
    trainer.limber.train()
    plain = activation_bytes(trainer)
    trainer.limber.language_model.gradient_checkpointing = True
    again = activation_bytes(trainer)
    tokens = trainer.limber.encoder.tokens + len(trainer.draw(0)[1]) + 1
    width, layers = 64, 2
    assert again < plain < 2 * layers * tokens * width * 2 * 16 and plain > layers * tokens * width * 2 * 8
    assert trainer.limber.language_model.gradient_checkpointing


@pytest.mark.parametrize(
    ("change", "says"),
    [({"steps": 0}, "steps must be"), ({"warmup": 12}, "warmup must be less than steps = 12"),
     ({"dropout": 1.0}, "dropout must lie"),
     ({"learning_rate": float("inf")}, "learning_rate must be finite; got inf"),
     ({"grad_clip": float("nan")}, "grad_clip must be finite; got nan"),
     ({"seed": 2**64}, r"seed must be a whole number of at least 0, below 2\^64; got 18446744073709551616"),
     ({"learning_rate": "fast"}, "learning_rate must be float"), ({"data": ""}, "data must be given")],
)  # fmt: skip
def test_settings_are_checked(config, change, says):
    with pytest.raises((ValueError, TypeError), match=f"train-limber: {says}"):
        dataclasses.replace(config, **change)
