"""LiMBeR's training on real picture files: what a step is, resuming, several processes, the command."""

import csv
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("timm")

from PIL import Image

from limber_fast import GPTJ, GPTJConfig, Limber
from limber_fast.models.encoders import encoder
from limber_fast.train_limber import activation_bytes, build, pairs_of
from limber_fast.training.checkpoint import LIMBER, load_checkpoint
from limber_fast.training.limber import LimberTrainer, linear_decay
from limber_fast.training.limber_config import LimberTrainConfig
from limber_fast.training.limber_data import cached_features

COLOURS = ("red", "lime", "blue", "cyan", "gray", "navy", "teal", "gold", "pink", "plum")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(folder of a language model with its tokenizer, folder of pictures in LiMBeR's layout, one of them broken)."""
    from gptj_cases import byte_tokenizer

    root = tmp_path_factory.mktemp("limber")
    config = GPTJConfig(vocab_size=300, n_positions=64, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, eos_token_id=0,
                        initializer_range=0.15)  # fmt: skip
    GPTJ.from_config(config, seed=1).save_pretrained(root / "lm")
    byte_tokenizer().save_pretrained(root / "lm")
    data = root / "data"
    for folder in ("images/0", "image_data/0"):
        (data / folder).mkdir(parents=True)
    for i, colour in enumerate(COLOURS):
        Image.new("RGB", (40, 40), colour).save(data / f"images/0/{i}.jpg")
        entry = {"image_path": f"images/0/{i}.jpg", "captions": [colour * (1 + i % 3)], "metadata": {}}
        (data / f"image_data/0/{i}.json").write_text(json.dumps(entry))
    (data / "images/0/9.jpg").write_bytes((data / "images/0/8.jpg").read_bytes()[:150])
    return root / "lm", data


@pytest.fixture
def config(files, tmp_path):
    lm, data = files
    return LimberTrainConfig(
        language_model=str(lm), data=str(data), output=str(tmp_path / "out"), encoder="timm:test_resnet",
        encoder_weights="random", steps=12, batch_size=6, micro_batch=3, warmup=2, learning_rate=5e-3, save_every=4,
        cache_features=True,
    )  # fmt: skip


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


def test_a_tuned_encoder_moves_at_its_own_rate(config):
    trainer = trainer_of(dataclasses.replace(config, encoder_learning_rate=1e-4, cache_features=False), cached=False)
    before = [p.clone() for p in trainer.limber.encoder.parameters()]
    trainer.train_step()
    moved = [(a - b).abs().max().item() for a, b in zip(before, trainer.limber.encoder.parameters(), strict=True)]
    assert max(moved) > 0 and max(moved) < 2e-4
    assert not any(p.requires_grad for p in trainer.limber.language_model.parameters())


def command(config, *options, processes=1):
    flags = ["--cache-features"] if config.cache_features else []
    flags += [f"--{f.name.replace('_', '-')}={getattr(config, f.name)}" for f in dataclasses.fields(config)
             if f.type in ("int", "float", "str") and getattr(config, f.name) != ""]  # fmt: skip
    python = [sys.executable]
    if processes > 1:
        python += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    return [*python, "-m", "limber_fast", "train-limber", *flags, *options]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("magma", [False, True])
def test_two_processes_train_as_one(config, tmp_path, magma):
    config = dataclasses.replace(config, dropout=0.0, steps=4, learning_rate=1e-3)
    if magma:
        config = dataclasses.replace(config, adapters=16, layer_norm=True, grad_checkpointing=True)
    maps = []
    for processes in (1, 2):
        mine = dataclasses.replace(config, output=str(tmp_path / f"of{processes}"))
        ours = command(mine, processes=processes)
        done = subprocess.run(ours, capture_output=True, text=True, timeout=600, env=ENVIRONMENT, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        maps.append(load_checkpoint(tmp_path / f"of{processes}" / "checkpoint.pt", LIMBER))
    for a, b in zip(*(found["parameters"] for found in maps), strict=True):
        # bf16 gradients; a step of AdamW moves a weight by 1e-3 whichever sign a gradient next to 0 rounds to
        assert (a - b).abs().mean() < 2e-5
    one, two = (found["history"][-1] for found in maps)
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-3)
    assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=0.02)


def test_processes_share_the_encoding(config, tmp_path):
    """Each writes its share into one file, equal to the one that a single process makes; broken pictures are named."""
    files = []
    for processes in (1, 3):
        mine = dataclasses.replace(config, steps=3, output=str(tmp_path / f"of{processes}"))
        ours = command(mine, processes=processes)
        done = subprocess.run(ours, capture_output=True, text=True, timeout=600, env=ENVIRONMENT, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        out = tmp_path / f"of{processes}"
        files.append(((out / "features.bin").read_bytes(), json.loads((out / "features.json").read_text())))
        assert "9.jpg" in (out / "skipped.txt").read_text() and not list(out.glob(".*"))
    (one, about), (three, other) = files
    assert about == other and about["rows"] == list(range(9))
    a, b = (torch.frombuffer(bytearray(x), dtype=torch.bfloat16).float() for x in (one, three))
    torch.testing.assert_close(a, b, atol=0.02, rtol=0.02)


def test_command_survives_being_killed(config, tmp_path):
    config = dataclasses.replace(config, steps=400, save_every=3)
    process = subprocess.Popen(command(config), stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=tmp_path)
    checkpoint = tmp_path / "out" / "checkpoint.pt"
    deadline = time.monotonic() + 300
    while not checkpoint.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.communicate()
    step = load_checkpoint(checkpoint, LIMBER)["step"]
    assert step % 3 == 0
    ours = [*command(dataclasses.replace(config, save_every=1000)), "--resume"]
    process = subprocess.Popen(ours, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=tmp_path)
    while "resumed" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=120)[0]
    state = load_checkpoint(checkpoint, LIMBER)
    assert process.returncode == (130 if state["step"] < 400 else 0), rest
    assert state["step"] > step and not list((tmp_path / "out").glob(".*"))
    with open(tmp_path / "out" / "train.csv", encoding="utf-8") as file:
        assert int(list(csv.DictReader(file))[-1]["step"]) == state["step"]


def test_command_ends_in_a_map_that_loads(config, tmp_path):
    done = subprocess.run(command(config), capture_output=True, text=True, timeout=600, env=ENVIRONMENT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "1 pictures could not be read" in done.stdout and "\x1b" not in done.stdout
    limber = Limber.from_pretrained(tmp_path / "out" / "map", GPTJ.from_pretrained(config.language_model), encoder=None)
    saved = load_checkpoint(tmp_path / "out" / "checkpoint.pt", LIMBER)
    assert torch.equal(limber.projection.weight, saved["parameters"][0])


def test_dry_run_and_toml(config, tmp_path):
    lines = [f"{name} = {json.dumps(value)}" for name, value in config.to_dict().items()]
    (tmp_path / "run.toml").write_text("\n".join(lines))
    ours = [sys.executable, "-m", "limber_fast", "train-limber", "--config", "run.toml", "--dry-run", "--batch-size=60"]
    done = subprocess.run(ours, capture_output=True, text=True, timeout=600, env=ENVIRONMENT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "MiB kept for the backward pass of 3" in done.stdout
    assert "60 = 1 x 20 x 3 pictures" in done.stdout and "12 steps" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.toml"]
    (tmp_path / "run.toml").write_text("stepz = 3")
    done = subprocess.run(ours, capture_output=True, text=True, timeout=600, env=ENVIRONMENT, cwd=tmp_path)
    assert done.returncode == 1 and "'stepz'" in done.stderr and "Traceback" not in done.stderr


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
     ({"learning_rate": "fast"}, "learning_rate must be float"), ({"data": ""}, "data must be given")],
)  # fmt: skip
def test_settings_are_checked(config, change, says):
    with pytest.raises((ValueError, TypeError), match=f"train-limber: {says}"):
        dataclasses.replace(config, **change)
