"""Encoders in their published shapes, with random weights and real picture files."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("open_clip")
pytest.importorskip("transformers")

import numpy as np
from PIL import Image

from limber_fast.data.emoji import EmojiDataset
from limber_fast.demo import build_trainer
from limber_fast.files import load_state
from limber_fast.models.encoders import encoder, small_pixels
from limber_fast.training.checkpoint import CheckpointError, load_checkpoint
from limber_fast.training.config import TrainConfig
from limber_fast.training.drawings import Drawings


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A wide JPEG and a transparent PNG, as files."""
    folder = tmp_path_factory.mktemp("pictures")
    wide = Image.linear_gradient("L").resize((500, 300)).convert("RGB")
    wide.save(folder / "wide.jpg")
    small = Image.new("RGBA", (100, 90), (255, 0, 0, 0))
    small.paste((0, 0, 255, 255), (0, 0, 50, 90))
    small.save(folder / "small.png")
    return [Image.open(folder / name) for name in ("wide.jpg", "small.png")]


@pytest.mark.parametrize(
    ("name", "tokens", "width", "size"),
    [("clip-random", 144, 3072, 384), ("beit-random", 196, 1024, 224), ("nfrn50-random", 1, 2048, 384),
     ("open_clip:RN50", 49, 2048, 224), ("open_clip:ViT-B-32", 49, 768, 224), ("timm:resnet18", 49, 512, 224),
     ("timm:vit_tiny_patch16_224", 196, 192, 224), ("timm:volo_d1_224", 196, 384, 224),
     ("timm:coat_lite_tiny", 49, 320, 224), ("open_clip:coca_ViT-B-32", 49, 768, 224)],
)  # fmt: skip
def test_shapes(name, tokens, width, size, pictures):
    found = encoder(name, weights=None)
    assert (found.tokens, found.width, found.size) == (tokens, width, (size, size))
    pixels = found.pixels(pictures)
    assert pixels.shape == (2, 3, size, size)
    with torch.no_grad():
        features = found(pixels)
    assert features.shape == (2, tokens, width) and features.isfinite().all() and features.std() > 0
    assert not found.training and not any(p.requires_grad for p in found.parameters())


def test_grid_is_row_by_row_before_the_attention_pooling():
    found = encoder("open_clip:RN50", weights=None)
    x = torch.randn(1, 3, 224, 224)
    trunk = found.trunk
    with torch.no_grad():
        grid = trunk.layer4(trunk.layer3(trunk.layer2(trunk.layer1(trunk.stem(x)))))
        features = found(x)
    torch.testing.assert_close(features[0, 7 * 2 + 3], grid[0, :, 2, 3])


@pytest.mark.parametrize("name", ["pit_ti_224", "pit_ti_distilled_224"])
def test_models_without_a_grid_are_refused(name):
    with pytest.raises(ValueError, match=r"^encoder: name must be a model whose features have places.* alone$"):
        encoder(f"timm:{name}", weights=None)


def test_patches_of_an_open_clip_model_that_pools_by_attention():
    found = encoder("open_clip:coca_ViT-B-32", weights=None)
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(found(x), found.trunk.transformer(found.trunk._embeds(x))[:, 1:])


def test_seeds_of_random_weights():
    state = torch.random.get_rng_state()
    one, same, other = (encoder("timm:resnet18", weights=None, seed=s).trunk.conv1.weight for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(state, torch.random.get_rng_state())


def test_nfrn50_crops_or_pads_with_zeros(pictures):
    preprocess = encoder("nfrn50-random").preprocess
    wide, small = (preprocess(picture) for picture in pictures)
    assert wide.min() >= 0 and wide.max() <= 1 and wide[:, 0].eq(0).all()
    assert small[:, :140].eq(0).all() and small[2, 192, 160] == 1


def test_preprocessed_tensors_of_another_size():
    found = encoder("timm:resnet18", weights=None)
    for shape in ((1, 3, 200, 224), (2, 1, 224, 224), (3, 224, 224)):
        with pytest.raises(ValueError, match=r"images must be pictures, or preprocessed to \[n, 3, 224, 224\]"):
            found.pixels(torch.zeros(shape))


def test_weights_from_a_file(tmp_path):
    state = encoder("timm:resnet18", weights=None, seed=5).trunk.state_dict()
    torch.save(state, tmp_path / "weights.pt")
    found = encoder("timm:resnet18", weights=tmp_path / "weights.pt")
    assert torch.equal(found.trunk.conv1.weight, state["conv1.weight"])
    torch.save({"other": torch.zeros(1)}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights\.pt: the file must hold 'conv1\.weight'"):
        encoder("timm:resnet18", weights=tmp_path / "weights.pt")


def test_the_demos_clip(tmp_path, pictures, monkeypatch):
    drawings = Drawings.of(EmojiDataset(fold="train"))
    trainer = build_trainer(TrainConfig(concepts_per_batch=8), drawings)
    trainer.save(tmp_path)
    found = encoder(f"demo:{tmp_path / 'checkpoint.pt'}")
    assert (found.tokens, found.width) == (4, 192)
    images = drawings.images[:3].float() / 255
    with torch.no_grad():
        torch.testing.assert_close(
            found.trunk.head(found(images).mT.flatten(1)), trainer.averaged_model().encode_image(images)
        )
    assert small_pixels(pictures[1])[:, :, -1].eq(1).all()  # transparency is white
    other = encoder(f"demo:{tmp_path / 'checkpoint.pt'}", weights=None)
    assert not torch.equal(other(images), found(images))
    monkeypatch.chdir(tmp_path)
    assert encoder("demo:checkpoint.pt").name == f"demo:{tmp_path / 'checkpoint.pt'}"


@pytest.mark.parametrize("name", ["resnet", "timm:", "beit:x", "timm:no_such_model", "open_clip:no-such"])
def test_unknown_names(name):
    with pytest.raises(ValueError, match="encoder: name must be"):
        encoder(name, weights=None)


def test_transformers_loads_in_the_repository_folder():
    """There `kernels` is a name of ours on sys.path, and transformers asks for a package of that name."""
    code = "from limber_fast.optional import needed; print(needed('transformers', 'test').BeitConfig().hidden_size)"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.strip() == "768", done.stderr


def test_missing_package_is_one_line():
    from limber_fast.optional import needed

    with pytest.raises(ImportError, match=r"^captions needs no_such_package: pip install no_such_package$"):
        needed("no_such_package.part", "captions")


@pytest.mark.parametrize("weights", ["/no/such/file.pt", "no_such_tag"])
@pytest.mark.parametrize("name", ["timm:test_resnet", "open_clip:RN50", "nfrn50"])
def test_weights_that_are_not_there_are_no_random_ones(name, weights):
    with pytest.raises((ValueError, OSError)):
        encoder(name, weights=weights)


def test_pretrained_open_clip_has_to_say_which():
    with pytest.raises(ValueError, match="encoder: weights must be one of openai"):
        encoder("open_clip:RN50")


def test_every_mode_of_a_picture(tmp_path):
    ramp = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    grey = small_pixels(Image.fromarray(ramp))
    assert grey.mean().item() == pytest.approx(0.5, abs=0.01)
    clear = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    clear.putpixel((0, 0), (0, 0, 0, 255))
    for mode in ("RGBA", "LA", "P"):
        picture = clear.quantize() if mode == "P" else clear.convert(mode)
        picture.save(tmp_path / "x.png")
        pixels = small_pixels(Image.open(tmp_path / "x.png"))
        assert pixels[:, 1:].min() > 0.99 and pixels[:, 0, 0].max() < 0.01, mode
    for mode in ("1", "L", "CMYK", "YCbCr", "HSV", "F", "I"):
        assert small_pixels(Image.new(mode, (40, 20))).shape == (3, 32, 32)


@pytest.mark.parametrize("content", [b"", b".", b"hello", b"\x80\x02", b"PK\x03\x04"])
@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_foreign_files_are_one_line(content, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\.\w+: the file must be a state dict"):
        load_state(tmp_path / name)
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path / name)
