"""Pictures with captions for LiMBeR, and a frozen encoder's features of them in a file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from limber_fast import checks
from limber_fast.data.captions import CaptionedImage
from limber_fast.data.emoji import EmojiDataset, concepts
from limber_fast.data.pictures import Broken, open_image
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


@dataclass
class Features:
    """rows[i] is the picture whose features are values[i]; `skipped` names the pictures that could not be read."""

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
    """[n, k, D] bfloat16 features of all readable pictures, memory-mapped from a file that is made once.

    The file appears whole or not at all. `key` says what it was made of; another key makes it anew.
    """
    path, about = folder / "features.bin", folder / "features.json"
    encoder, found = limber.encoder, None
    if path.exists() and about.exists():
        with contextlib.suppress(ValueError):  # what is not whole is made anew
            found = json.loads(about.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or found.get("key") != key:
        found = _write(limber, pairs, path, about, key, watch)
    shape = (len(found["rows"]), encoder.tokens, encoder.width)
    if path.stat().st_size != 2 * int(np.prod(shape)):
        raise checks.invalid(str(path), "the file", f"hold {shape} numbers of 2 bytes", f"{path.stat().st_size} bytes")
    raw = np.memmap(path, np.uint16, "r", shape=shape)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        values = torch.from_numpy(raw).view(torch.bfloat16)
    return Features(values, found["rows"], found["skipped"])


def _write(limber: Limber, pairs: Pairs, path: Path, about: Path, key: str, watch: Callable[[int, int], None]) -> dict:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    about.unlink(missing_ok=True)  # from here on the old features count no more
    rows, skipped = [], {}
    try:
        with open(temporary, "wb") as file:
            for start in range(0, len(pairs), _AT_ONCE):
                images, read = [], []
                for index in range(start, min(start + _AT_ONCE, len(pairs))):
                    image = read_image(pairs, index, skipped)
                    if image is not None:
                        images.append(image)
                        read.append(index)
                if images:
                    values = limber.encode(images).to("cpu", torch.bfloat16).contiguous()
                    file.write(values.view(torch.uint16).numpy().tobytes())
                    rows += read
                watch(min(start + _AT_ONCE, len(pairs)), len(pairs))
            file.flush()
            os.fsync(file.fileno())
        if not rows:
            raise checks.invalid("train-limber", "data", "hold a readable picture", f"{len(skipped)} broken ones")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    found = {"key": key, "rows": rows, "skipped": list(skipped.values())}
    replace(about, json.dumps(found).encode())
    return found


def read_image(pairs: Pairs, index: int, skipped: dict[int, str]) -> Image | None:
    """The picture, or None and its name among the skipped."""
    found = pairs.image(index)
    if isinstance(found, Broken):
        skipped[index] = f"{found.name}: {found.reason}"
        return None
    return found
