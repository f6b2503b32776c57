"""WebDataset shards by number: in which tar file each sample lies and where, for drawing samples in any order."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from limber_fast.data.captions import CaptionedImage
from limber_fast.data.index import BrokenIndex
from limber_fast.data.pictures import Broken
from limber_fast.data.shards import IMAGES, expand_shards, extension_of, key_of, sample_of

_TEXTS = ("txt", "json")
_NONE = -1


class ShardIndex:
    """Samples of uncompressed tar files, in the order of the files and of what is in them.

    Every header and every caption is read once, at the start; an image is read when it is asked for, in one call. It
    holds 40 bytes and a key for each sample.

    Args:
        shards: as for `expand_shards`. progress: called as (shards read, all).
    Raises: BrokenIndex for a shard that ends early, is compressed or is none, and for a sample without a caption.
    """

    def __init__(
        self, shards: str | Path | Sequence[str | Path], progress: Callable[[int, int], None] = lambda done, of: None
    ):
        self.shards = expand_shards(shards)
        tables, keys = [], []
        for number, path in enumerate(self.shards):
            table, names = _scan(path, number)
            tables.append(table)
            keys.append(names)
            progress(number + 1, len(self.shards))
        self._table, self._keys = np.concatenate(tables), np.concatenate(keys)

    def __len__(self) -> int:
        return len(self._table)

    def sample(self, index: int) -> CaptionedImage | Broken:
        """As `read_shard` gives it."""
        path, parts = self._parts(index)
        with open(path, "rb") as file:
            content = {name: os.pread(file.fileno(), size, at) for name, (at, size) in parts.items()}
        return sample_of(path, self._keys[index].decode(), content)

    def captions(self, index: int) -> tuple[str, ...]:
        """Without reading the image."""
        path, parts = self._parts(index)
        parts.pop(IMAGES[0], None)
        with open(path, "rb") as file:
            content = {name: os.pread(file.fileno(), size, at) for name, (at, size) in parts.items()}
        return sample_of(path, self._keys[index].decode(), {**content, IMAGES[0]: b""}).captions

    def _parts(self, index: int) -> tuple[Path, dict[str, tuple[int, int]]]:
        """The file, and offset and size of image (whatever its format) and text."""
        shard, kind, text, text_size, image, size = self._table[index].tolist()
        parts = {_TEXTS[kind]: (text, text_size)}
        return self.shards[shard], parts if image == _NONE else {**parts, IMAGES[0]: (image, size)}

    def key(self) -> str:
        """Differs where the files do."""
        digest = hashlib.sha256()
        for path in self.shards:
            found = path.stat()
            digest.update(f"{path} {found.st_size} {found.st_mtime_ns}".encode())
        return digest.hexdigest()


def _scan(path: Path, number: int) -> tuple[np.ndarray, np.ndarray]:
    """[n, 6] int64: shard, kind of text, its offset and size, the image's; and [n] keys."""
    rows, keys, key = [], [], "the first sample"
    try:
        with tarfile.open(path, "r:") as file, open(path, "rb") as raw:
            for key, members in groupby(filter(tarfile.TarInfo.isfile, file), key_of):
                parts = {extension_of(member): (member.offset_data, member.size) for member in members}
                image = next((parts[kind] for kind in IMAGES if kind in parts), (_NONE, _NONE))
                text = next((kind for kind in _TEXTS if kind in parts), "json")
                at, size = parts.get(text, (0, 0))
                content = os.pread(raw.fileno(), size, at) if text in parts else b"{}"
                sample_of(path, key, {text: content, IMAGES[0]: b""})  # a caption that cannot be read stops all
                rows.append((number, _TEXTS.index(text), at, size, *image))
                keys.append(key.encode())
    except (tarfile.TarError, EOFError) as error:
        raise BrokenIndex(f"{path}, at {key}: not a whole, uncompressed tar file: {error}") from None
    if not rows:
        raise BrokenIndex(f"{path}: no samples")
    return np.array(rows, np.int64), np.array(keys)
