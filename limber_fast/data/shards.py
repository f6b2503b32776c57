"""WebDataset shards, as img2dataset writes CC3M: tar files in which the members of a sample share a name.

`00042.jpg` goes with `00042.txt`, one caption, or with `00042.json`, which has `caption` or `captions`. Read with the
standard library alone.
"""

from __future__ import annotations

import glob
import json
import random
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from limber_fast.data.captions import CaptionedImage
from limber_fast.data.index import BrokenIndex
from limber_fast.data.pictures import Broken, Image, open_record

IMAGES = ("jpg", "jpeg", "png", "webp")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def expand_shards(shards: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files of `cc3m-{00000..00331}.tar` and `cc3m-*.tar`, each pattern's in ascending order.

    Raises: FileNotFoundError for a file that is missing, or a pattern that no file matches.
    """
    found: list[Path] = []
    for pattern in map(str, [shards] if isinstance(shards, (str, Path)) else shards):
        names = _numbered(pattern)
        names = [name for one in names for name in (sorted(glob.glob(one)) if "*" in one else [one])]
        missing = [name for name in names if not Path(name).is_file()] or ([] if names else [pattern])
        if missing:
            raise FileNotFoundError(f"{missing[0]}: no such shard")
        found += map(Path, names)
    return found


def _numbered(pattern: str) -> list[str]:
    if (numbers := _RANGE.search(pattern)) is None:
        return [pattern]
    first, last = numbers.groups()
    every = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return [name for number in every for name in _numbered(pattern.replace(numbers[0], number, 1))]


def read_shard(path: str | Path) -> Iterator[CaptionedImage | Broken]:
    """Every sample of a shard in its order; its `image_id` is `cc3m-00000.tar: 00042`, its image the file's content.

    A sample without an image is Broken, so that it is counted like any other image that cannot be opened.

    Raises: BrokenIndex for a shard that ends early or is none, and for a sample without a caption.
    """
    path = Path(path)
    key = "the first sample"
    try:
        with tarfile.open(path) as file:
            for key, members in groupby(filter(tarfile.TarInfo.isfile, file), key_of):
                parts = {extension_of(member): file.extractfile(member).read() for member in members}
                yield sample_of(path, key, parts)
    except (tarfile.TarError, EOFError) as error:
        raise BrokenIndex(f"{path}, at {key}: not a whole tar file: {error}") from None


def key_of(member: tarfile.TarInfo) -> str:
    """The path up to the first dot of the file's name."""
    name = PurePosixPath(member.name)
    return (name.parent / name.name.partition(".")[0]).as_posix()


def extension_of(member: tarfile.TarInfo) -> str:
    return PurePosixPath(member.name).name.partition(".")[2].lower()


def sample_of(path: Path, key: str, parts: dict[str, bytes]) -> CaptionedImage | Broken:
    name = f"{path.name}: {key}"
    image = next((parts[kind] for kind in IMAGES if kind in parts), None)
    if image is None:
        return Broken(name, "no image")
    try:
        if "txt" in parts:
            captions: Any = [parts["txt"].decode().strip()]
        else:
            content = json.loads(parts.get("json", b"{}"))
            captions = content.get("captions") or [content.get("caption")]
    except (ValueError, AttributeError) as error:
        raise BrokenIndex(f"{path}, {key}: its caption cannot be read: {error}") from None
    if not (isinstance(captions, list) and all(isinstance(text, str) for text in captions)):
        raise BrokenIndex(f"{path}, {key}: no caption, in {key}.txt or as 'caption' or 'captions' in {key}.json")
    return CaptionedImage(name, image, tuple(captions))


class ShardPictures(torch.utils.data.IterableDataset):
    """Shards as a dataset: `DataLoader(ShardPictures(shards, transform), collate_fn=collate, num_workers=4, ...)`.

    Every shard is read by one worker of one process: have at least as many shards as workers in all.

    Args:
        shards: as for `expand_shards`.
        transform: from a PIL image in RGB to a tensor.
        seed: of the order of shards and of samples within `buffer`, another one in every epoch; None for their own.
        buffer: samples among which the next is drawn.
        rank, processes: this process's share; torch.distributed's where it is initialised.
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        transform: Callable[[Image.Image], torch.Tensor],
        *,
        seed: int | None = None,
        buffer: int = 1000,
        rank: int | None = None,
        processes: int | None = None,
    ):
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.shards, self.transform, self.seed, self.buffer = expand_shards(shards), transform, seed, buffer
        self.rank = rank if rank is not None else torch.distributed.get_rank() if distributed else 0
        self.processes = processes or (torch.distributed.get_world_size() if distributed else 1)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Before the loader's workers start: which of the orders comes next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[torch.Tensor, CaptionedImage] | Broken]:
        worker = torch.utils.data.get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        shards = list(self.shards)
        if self.seed is not None:
            random.Random(f"{self.seed} {self.epoch}").shuffle(shards)  # the same in every worker
        mine = shards[self.rank * workers + number :: self.processes * workers]
        samples = (sample for shard in mine for sample in read_shard(shard))
        if self.seed is not None:
            samples = _shuffled(samples, self.buffer, random.Random(f"{self.seed} {self.epoch} {self.rank} {number}"))
        for sample in samples:
            found = sample if isinstance(sample, Broken) else open_record(sample)
            yield found if isinstance(found, Broken) else (self.transform(found), sample)


def _shuffled(samples: Iterator[Any], buffer: int, chosen: random.Random) -> Iterator[Any]:
    held: list[Any] = []
    for sample in samples:
        held.append(sample)
        if len(held) >= buffer:
            yield held.pop(chosen.randrange(len(held)))
    chosen.shuffle(held)
    yield from held
