"""Pictures with captions for LiMBeR, and a frozen encoder's features of them in a file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from PIL.Image import Image
from torch import Tensor

from limber_fast import checks
from limber_fast.data.captions import CaptionedImage
from limber_fast.data.emoji import EmojiDataset, concepts
from limber_fast.data.pictures import Broken, open_image, open_record
from limber_fast.data.shard_index import ShardIndex
from limber_fast.files import replace
from limber_fast.models.limber import Limber

_AT_ONCE = 32


class Pairs(Protocol):
    """A map-style data set of pictures, each with one caption or several."""

    def __len__(self) -> int: ...
    def image(self, index: int) -> Image | Broken: ...
    def captions(self, index: int) -> Sequence[str]: ...
    def key(self) -> str:
        """Differs where the pictures do."""


class EmojiPairs:
    """The shipped emoji of the training vendors: every reference name of a concept is a caption."""

    def __init__(self, dataset: EmojiDataset | None = None) -> None:
        self.dataset = EmojiDataset() if dataset is None else dataset
        self._known = concepts()

    def __len__(self) -> int:
        return len(self.dataset)

    def image(self, index: int) -> Image:
        return self.dataset[index][0]

    def captions(self, index: int) -> Sequence[str]:
        return self._known[int(self.dataset.concept[index])].names

    def key(self) -> str:
        return hashlib.sha256(self.dataset.images.tobytes()).hexdigest()


class FilePairs:
    """Files with captions, as the readers of `limber_fast.data.captions` give them."""

    def __init__(self, records: Sequence[CaptionedImage]) -> None:
        self.records = [record for record in records if record.captions]
        if not self.records:
            raise checks.invalid("train-limber", "data", "hold a picture with a caption", "none")

    def __len__(self) -> int:
        return len(self.records)

    def image(self, index: int) -> Image | Broken:
        return open_image(self.records[index].image)

    def captions(self, index: int) -> Sequence[str]:
        return self.records[index].captions

    def key(self) -> str:
        digest = hashlib.sha256()
        for record in self.records:
            found = record.image.stat() if record.image.exists() else None
            digest.update(f"{record.image} {found and (found.st_size, found.st_mtime_ns)}".encode())
        return digest.hexdigest()


class ShardPairs:
    """WebDataset shards, as of CC3M: every caption is known at the start, pictures are read when they are drawn."""

    def __init__(self, index: ShardIndex) -> None:
        self.index = index

    def __len__(self) -> int:
        return len(self.index)

    def image(self, index: int) -> Image | Broken:
        found = self.index.sample(index)
        return found if isinstance(found, Broken) else open_record(found)

    def captions(self, index: int) -> Sequence[str]:
        return self.index.captions(index)

    def key(self) -> str:
        return self.index.key()


@dataclass
class Features:
    """values[row] are the features of picture `row`, for each of `rows`; `skipped` names the broken others."""

    values: Tensor
    rows: list[int]
    skipped: list[str] = field(default_factory=list)


def features_key(limber: Limber, pairs: Pairs) -> str:
    """Of the encoder's weights, whatever file they came from, and of the pictures."""
    digest = hashlib.sha256(f"{limber.encoder.name} {pairs.key()}".encode())
    for name, tensor in limber.encoder.trunk.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def cached_features(
    limber: Limber, pairs: Pairs, folder: Path, key: str, watch: Callable[[int, int], None] = lambda done, of: None
) -> Features:
    """[n, k, D] bfloat16 features of all pictures, memory-mapped from a file that is made once.

    Every process of a group encodes its share into the file, which appears whole or not at all. `key` says what it was
    made of; another key makes it anew. `watch` is told of this process's share.

    Raises: ValueError in every process where `folder` is not one that all share.
    """
    path, about = folder / "features.bin", folder / "features.json"
    found = _first(_about(about, key) if path.exists() else None)
    if found is None:
        found = _write(limber, pairs, path, about, key, watch)
    else:
        _shared(folder, path.exists() and _about(about, key) == found)
    shape = (len(pairs), limber.encoder.tokens, limber.encoder.width)
    if path.stat().st_size != 2 * int(np.prod(shape)):
        raise checks.invalid(str(path), "the file", f"hold {shape} numbers of 2 bytes", f"{path.stat().st_size} bytes")
    raw = np.memmap(path, np.uint16, "r", shape=shape)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        values = torch.from_numpy(raw).view(torch.bfloat16)
    return Features(values, found["rows"], found["skipped"])


def _about(path: Path, key: str) -> dict | None:
    with contextlib.suppress(ValueError, OSError):  # what is not whole is made anew
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict) and found.get("key") == key:
            return found
    return None


def _write(limber: Limber, pairs: Pairs, path: Path, about: Path, key: str, watch: Callable[[int, int], None]) -> dict:
    """Every process writes the rows of its share into one file; the first one names it when all are done."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    share = range(rank * len(pairs) // world, (rank + 1) * len(pairs) // world)
    row_bytes = 2 * limber.encoder.tokens * limber.encoder.width
    # A name of this run alone: what a killed one left in another machine's folder is not taken for the shared file.
    temporary = path.with_name(_first(f".{path.name}.{secrets.token_hex(4)}.part"))
    if rank == 0:
        about.unlink(missing_ok=True)  # from here on the old features count no more
        for left in path.parent.glob(f".{path.name}.*part"):
            left.unlink()
        with open(temporary, "wb") as file:
            file.truncate(len(pairs) * row_bytes)
    rows: list[int] = []
    skipped: dict[int, str] = {}
    try:
        _wait()
        _shared(path.parent, temporary.exists())
        with open(temporary, "rb+") as file:
            for start in range(share.start, share.stop, _AT_ONCE):
                some = range(start, min(start + _AT_ONCE, share.stop))
                read = [(index, image) for index in some if (image := read_image(pairs, index, skipped)) is not None]
                if read:
                    values = limber.encode([image for _, image in read]).to("cpu", torch.bfloat16).contiguous()
                    for (index, _), value in zip(read, values.view(torch.uint16).numpy(), strict=True):
                        file.seek(index * row_bytes)
                        file.write(value.tobytes())
                    rows += [index for index, _ in read]
                watch(some.stop - share.start, len(share))
            file.flush()
            os.fsync(file.fileno())
        shares = [(rows, list(skipped.values()))]
        if world > 1:
            shares = [([], [])] * world
            dist.all_gather_object(shares, (rows, list(skipped.values())))
        rows, broken = (list(chain.from_iterable(part)) for part in zip(*shares, strict=True))
        found = {"key": key, "rows": rows, "skipped": broken}
        if not found["rows"]:
            raise checks.invalid("train-limber", "data", "hold a readable picture", f"{len(broken)} broken")
        if rank == 0:
            os.replace(temporary, path)
            replace(about, json.dumps(found))
        _wait()
    finally:
        if rank == 0:
            temporary.unlink(missing_ok=True)
    return found


def _first(mine: Any) -> Any:
    """What the first process has, for all."""
    found = [mine]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    return found[0]


def _shared(folder: Path, sees: bool) -> None:
    """Every process tells whether it sees the first one's file; all raise where one does not."""
    found = [sees]
    if dist.is_initialized():
        found *= dist.get_world_size()
        dist.all_gather_object(found, sees)
    if not all(found):
        contract = f"be a folder that all processes share, as cache_features has the features in {folder}"
        raise checks.invalid("train-limber", "output", contract, f"another one in process {found.index(False)}")


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()


def read_image(pairs: Pairs, index: int, skipped: dict[int, str]) -> Image | None:
    """The picture, or None and its name among the skipped."""
    found = pairs.image(index)
    if isinstance(found, Broken):
        skipped[index] = f"{found.name}: {found.reason}"
        return None
    return found
