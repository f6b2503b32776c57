"""WebDataset shards written here with real images, read alone, by workers, and beside webdataset's own reader."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

Image = pytest.importorskip("PIL.Image")

from limber_fast.data.captions import CaptionedImage  # noqa: E402
from limber_fast.data.index import BrokenIndex  # noqa: E402
from limber_fast.data.pictures import Broken, Skipped, collate, open_record  # noqa: E402
from limber_fast.data.shard_index import ShardIndex  # noqa: E402
from limber_fast.data.shards import ShardPictures, expand_shards, read_shard  # noqa: E402


def content(seed, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 9, 3), np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def write_shard(path, members):
    with tarfile.open(path, "w") as file:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            file.addfile(entry, io.BytesIO(data))


def samples(first, count):
    for i in range(first, first + count):
        yield f"{i:05d}.png", content(i)
        yield f"{i:05d}.txt", f"caption {i}\n".encode()
        yield f"{i:05d}.json", json.dumps({"caption": "not this one"}).encode()


@pytest.fixture
def shards(tmp_path):
    """Five shards of four samples; in the last one image is broken and one is not there."""
    for shard in range(5):
        members = list(samples(4 * shard, 4))
        if shard == 4:
            members[3] = (members[3][0], members[3][1][:50])
            del members[6]
        write_shard(tmp_path / f"cc3m-{shard:03d}.tar", members)
    return tmp_path


def tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def test_samples_in_their_order(shards):
    found = list(read_shard(shards / "cc3m-001.tar"))
    assert [(r.image_id, r.captions) for r in found] == [
        (f"cc3m-001.tar: {i:05d}", (f"caption {i}",)) for i in range(4, 8)
    ]
    assert found[2].image == content(6) and open_record(found[2]).size == (9, 8)


def test_kinds_of_captions(tmp_path):
    image = content(0, "JPEG")
    write_shard(tmp_path / "x.tar", [
        ("a/1.JPG", image), ("a/1.json", b'{"caption": "one"}'),
        ("b/1.seg.png", content(1)), ("b/1.json", b'{"captions": ["two", "three"], "width": 9}'), ("b/1.jpg", image),
    ])  # fmt: skip
    first, second = read_shard(tmp_path / "x.tar")
    assert (first.image_id, first.captions) == ("x.tar: a/1", ("one",))
    assert (second.image_id, second.captions, second.image) == ("x.tar: b/1", ("two", "three"), image)


def test_patterns(shards):
    assert [p.name for p in expand_shards(f"{shards}/cc3m-{{001..003}}.tar")] == [f"cc3m-00{i}.tar" for i in (1, 2, 3)]
    assert len(expand_shards([f"{shards}/cc3m-00[0-1].t*", shards / "cc3m-004.tar"])) == 3
    for missing in ("cc3m-{003..005}.tar", "nothing-*.tar"):
        with pytest.raises(FileNotFoundError, match="no such shard"):
            expand_shards(f"{shards}/{missing}")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("seed", [None, 3])
def test_every_sample_once(shards, workers, seed):
    skipped, found = Skipped(), []
    for rank in range(2):
        dataset = ShardPictures(f"{shards}/cc3m-*.tar", tensor, seed=seed, buffer=3, rank=rank, processes=2)
        loader = DataLoader(dataset, batch_size=3, collate_fn=collate, num_workers=workers)
        for batch in skipped.batches(loader):
            for image, record in zip(batch.images, batch.records, strict=True):
                number = int(record.captions[0].split()[1])
                np.testing.assert_array_equal(image, tensor(Image.open(io.BytesIO(content(number)))))
                found.append(number)
    assert sorted(found) == [i for i in range(20) if i not in (17, 18)]
    assert sorted((b.name, b.reason != "no image") for b in skipped.images) == [
        ("cc3m-004.tar: 00017", True), ("cc3m-004.tar: 00018", False)
    ]  # fmt: skip


def test_order_depends_on_seed_and_epoch(shards):
    def order(seed, epoch):
        dataset = ShardPictures(f"{shards}/cc3m-{{000..003}}.tar", tensor, seed=seed, buffer=5)
        dataset.set_epoch(epoch)
        return [record.captions for _, record in dataset]

    assert order(1, 0) == order(1, 0)
    assert len({str(order(seed, epoch)) for seed, epoch in ((None, 0), (1, 0), (1, 1), (2, 0))}) == 4


def test_broken_shards_stop(shards, tmp_path):
    path = tmp_path / "bad.tar"
    path.write_bytes((shards / "cc3m-000.tar").read_bytes()[:3700])
    with pytest.raises(BrokenIndex, match=r"bad\.tar, at 0000\d: not a whole tar file"):
        list(read_shard(path))
    path.write_text("no tar at all")
    with pytest.raises(BrokenIndex, match=r"bad\.tar, at the first sample: not a whole tar file"):
        list(read_shard(path))
    for members in ([("7.png", content(0))], [("7.png", content(0)), ("7.json", b'{"caption": 5}')]):
        write_shard(path, members)
        with pytest.raises(BrokenIndex, match=r"bad\.tar, 7: no caption"):
            list(read_shard(path))
    write_shard(path, [("7.png", content(0)), ("7.json", b"{")])
    with pytest.raises(BrokenIndex, match=r"bad\.tar, 7: its caption cannot be read"):
        list(read_shard(path))
    write_shard(path, [("7.txt", b"x"), ("8.png", b""), ("8.txt", b"y")])
    first, second = read_shard(path)
    assert first == Broken("bad.tar: 7", "no image") and isinstance(second, CaptionedImage)
    assert isinstance(open_record(second), Broken)


def test_as_webdataset_reads_them(shards):
    webdataset = pytest.importorskip("webdataset")
    path = shards / "cc3m-002.tar"
    theirs = [
        (s["__key__"], s["png"], s["txt"].decode().strip())
        for s in webdataset.WebDataset(str(path), shardshuffle=False)
    ]
    assert [(r.image_id.split(": ")[1], r.image, r.captions[0]) for r in read_shard(path)] == theirs


def test_index_gives_every_sample_of_the_shards(shards):
    progress = []
    index = ShardIndex(shards / "cc3m-{000..004}.tar", lambda done, of: progress.append((done, of)))
    expected = [sample for path in expand_shards(shards / "*.tar") for sample in read_shard(path)]
    assert len(index) == len(expected) == 20 and progress == [(i, 5) for i in range(1, 6)]
    for i in np.random.default_rng(0).permutation(20):
        assert index.sample(i) == expected[i]
        if not isinstance(expected[i], Broken):
            assert index.captions(i) == expected[i].captions
    key = index.key()
    (shards / "cc3m-001.tar").write_bytes((shards / "cc3m-002.tar").read_bytes() + b"\0" * 512)
    assert ShardIndex(shards / "*.tar").key() != key


def test_index_stops_at_what_is_broken(tmp_path):
    path = tmp_path / "a.tar"
    good = list(samples(0, 2))
    for members, says in (
        ([good[0]], "a.tar, 00000: no caption"),
        ([good[0], ("00000.txt", b"\xff\xfe")], "a.tar, 00000: its caption cannot be read"),
        ([good[0], ("00000.json", b'{"caption": 3}')], "a.tar, 00000: no caption"),
        ([], "a.tar: no samples"),
    ):
        write_shard(path, members)
        with pytest.raises(BrokenIndex, match=says):
            ShardIndex(path)
    write_shard(path, good)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(good[0][1]) + 700])
    with pytest.raises(BrokenIndex, match="not a whole, uncompressed tar file"):
        ShardIndex(path)
    with tarfile.open(path, "w:gz") as file:
        file.add(__file__, "x.txt")
    with pytest.raises(BrokenIndex, match="not a whole, uncompressed tar file"):
        ShardIndex(path)
