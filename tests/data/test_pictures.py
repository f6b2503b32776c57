"""Images on disk, some of them broken: counted, named, skipped."""

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

Image = pytest.importorskip("PIL.Image")

from limber_fast.data.captions import CaptionedImage  # noqa: E402
from limber_fast.data.pictures import Broken, Pictures, Skipped, collate, open_image  # noqa: E402


def pixels(seed):
    return np.random.default_rng(seed).integers(0, 256, (20, 30, 3), np.uint8)


@pytest.fixture
def records(tmp_path):
    """Seven images: good ones in four formats, a truncated one, a text and a missing file."""
    Image.fromarray(pixels(0)).save(tmp_path / "a.png")
    Image.fromarray(pixels(1)).save(tmp_path / "b.jpg")
    Image.fromarray(pixels(2)).convert("L").save(tmp_path / "c.png")
    Image.fromarray(pixels(3)).quantize(16).save(tmp_path / "d.gif")
    whole = io.BytesIO()
    Image.fromarray(pixels(4)).save(whole, "JPEG")
    (tmp_path / "e.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    (tmp_path / "f.jpg").write_text("<html>404</html>")
    names = ["a.png", "e.jpg", "b.jpg", "f.jpg", "c.png", "g.jpg", "d.gif"]
    return [CaptionedImage(number, tmp_path / name, (name,)) for number, name in enumerate(names)]


def tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def test_good_ones_come_out_in_order_and_in_rgb(records):
    skipped = Skipped()
    found = list(skipped.open(records))
    assert [record.captions[0] for _, record in found] == ["a.png", "b.jpg", "c.png", "d.gif"]
    assert all((image.mode, image.size) == ("RGB", (30, 20)) for image, _ in found)
    np.testing.assert_array_equal(np.array(found[0][0]), pixels(0))


def test_broken_ones_are_counted_and_named(records, tmp_path):
    skipped = Skipped()
    assert str(skipped) == "no broken images"
    list(skipped.open(records))
    assert [(b.name, bool(b.reason)) for b in skipped.images] == [
        (str(tmp_path / name), True) for name in ("e.jpg", "f.jpg", "g.jpg")
    ]
    text = str(skipped)
    assert len(skipped) == 3 and text.startswith("3 broken images skipped: ")
    assert f"{tmp_path / 'f.jpg'} (not an image)" in text and "runcated" in text
    assert f"{tmp_path / 'g.jpg'} (no such file)" in text
    list(skipped.open(records * 3))
    assert str(skipped).endswith(", and 2 more")


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_a_loader(records, workers):
    skipped = Skipped()
    loader = DataLoader(Pictures(records, tensor), batch_size=2, collate_fn=collate, num_workers=workers)
    batches = list(skipped.batches(loader))
    assert [[record.image_id for record in batch.records] for batch in batches] == [[0], [2], [4], [6]]
    assert [len(batch.images) for batch in batches] == [1, 1, 1, 1]
    assert len(skipped) == 3
    np.testing.assert_array_equal(batches[0].images[0], pixels(0).transpose(2, 0, 1))


def test_a_batch_with_nothing_left_is_left_out(records):
    skipped = Skipped()
    loader = DataLoader(Pictures([records[1], records[3], records[0]], tensor), batch_size=2, collate_fn=collate)
    assert [[record.image_id for record in batch.records] for batch in skipped.batches(loader)] == [[0]]
    assert len(skipped) == 2


def test_a_faulty_transform_is_no_broken_image(records):
    def faulty(image):
        raise ValueError("my own mistake")

    with pytest.raises(ValueError, match="my own mistake"):
        Pictures(records, faulty)[0]


def test_content_in_memory():
    whole = io.BytesIO()
    Image.fromarray(pixels(5)).save(whole, "PNG")
    np.testing.assert_array_equal(np.array(open_image(whole.getvalue(), "x")), pixels(5))
    found = open_image(whole.getvalue()[:40], "shard.tar: 7.png")
    assert isinstance(found, Broken) and found.name == "shard.tar: 7.png"
    assert isinstance(open_image(b"", "nothing"), Broken)


def test_without_pillow_one_line_says_what_to_install():
    code = "import sys; sys.modules['PIL'] = None; import limber_fast.data.pictures"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: opening images needs pillow: pip install pillow"
