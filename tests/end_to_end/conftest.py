"""LiMBeR's training in small: a language model and pictures on disk, and the settings of a run over them."""

from __future__ import annotations

import json

import pytest

COLOURS = ("red", "lime", "blue", "cyan", "gray", "navy", "teal", "gold", "pink", "plum")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(folder of a language model with its tokenizer, folder of pictures in LiMBeR's layout, one of them broken)."""
    from gptj_cases import byte_tokenizer
    from PIL import Image

    from limber_fast import GPTJ, GPTJConfig

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
    from limber_fast.training.limber_config import LimberTrainConfig

    lm, data = files
    return LimberTrainConfig(
        language_model=str(lm), data=str(data), output=str(tmp_path / "out"), encoder="timm:test_resnet",
        encoder_weights="random", steps=12, batch_size=6, micro_batch=3, warmup=2, learning_rate=5e-3, save_every=4,
        cache_features=True,
    )  # fmt: skip
