"""Opening images of which some are broken: those are counted, named and skipped."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from limber_fast.optional import needed

PIL = needed("PIL", "opening images")
Image = needed("PIL.Image", "opening images")
# What Pillow raises on files that are no images, or only the beginning of one.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class Broken:
    """An image that could not be opened: its name, and why."""

    name: str
    reason: str


def to_rgb(image: Image.Image) -> Image.Image:
    """8 bits RGB of a picture in any mode: what is transparent is white, 16-bit and floating-point grey are scaled."""
    if image.mode.startswith("I") or image.mode == "F":
        import numpy as np

        values = np.asarray(image, np.float32)
        high = 65535.0 if image.mode.startswith("I") else max(float(values.max(initial=0.0)), 1e-12)
        image = Image.fromarray((values.clip(0, high) * (255 / high)).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def open_image(source: str | Path | bytes, name: str | None = None) -> Image.Image | Broken:
    """The image in RGB, every pixel decoded, or what is wrong with it.

    Args:
        source: a file, or the content of one. name: of the content, for the report.
    """
    name = str(source) if name is None else name
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return to_rgb(image)
    except _BROKEN as error:
        named = {FileNotFoundError: "no such file", PIL.UnidentifiedImageError: "not an image"}
        return Broken(name, named.get(type(error)) or str(error) or type(error).__name__)


def open_record(record: Any) -> Image.Image | Broken:
    """`record.image`, named by its file, or in a shard by `record.image_id`."""
    return open_image(record.image, str(record.image_id) if isinstance(record.image, bytes) else None)


class Skipped:
    """The broken images met so far."""

    def __init__(self) -> None:
        self.images: list[Broken] = []

    def __len__(self) -> int:
        return len(self.images)

    def __str__(self) -> str:
        """`2 broken images skipped: a.jpg (no such file), b.jpg (truncated)`, the first ten by name."""
        if not self.images:
            return "no broken images"
        names = [f"{image.name} ({image.reason})" for image in self.images[:10]]
        more = [f"and {len(self) - 10} more"] if len(self) > 10 else []
        return f"{len(self)} broken image{'s' * (len(self) > 1)} skipped: {', '.join(names + more)}"

    def open(self, records: Iterable[Any]) -> Iterator[tuple[Image.Image, Any]]:
        """Image and record of every record whose `image` can be opened, in their order."""
        for record in records:
            if isinstance(found := open_record(record), Broken):
                self.images.append(found)
            else:
                yield found, record

    def batches(self, loader: Iterable[PictureBatch]) -> Iterator[PictureBatch]:
        """The batches of a DataLoader over `Pictures` or `ShardPictures`, without those of which nothing is left."""
        for batch in loader:
            self.images += batch.broken
            if batch.records:
                yield batch


@dataclass
class PictureBatch:
    """`images` [b, ...] as transformed, their `records`, and what was left out."""

    images: torch.Tensor | None
    records: list[Any]
    broken: list[Broken]

    def pin_memory(self) -> PictureBatch:
        images = None if self.images is None else self.images.pin_memory()
        return PictureBatch(images, self.records, self.broken)


class Pictures(torch.utils.data.Dataset):
    """Records with an `image` as a dataset: `DataLoader(Pictures(records, transform), collate_fn=collate, ...)`.

    Args:
        records: a list of `CaptionedImage`, `Question`, or anything with an `image`.
        transform: from a PIL image in RGB to a tensor.
    """

    def __init__(self, records: Sequence[Any], transform: Callable[[Image.Image], torch.Tensor]):
        self.records, self.transform = records, transform

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Any] | Broken:
        record = self.records[index]
        found = open_record(record)
        return found if isinstance(found, Broken) else (self.transform(found), record)


def collate(samples: Sequence[tuple[torch.Tensor, Any] | Broken]) -> PictureBatch:
    """One batch of what could be opened; broken images travel beside it, so that no worker hides them."""
    good = [sample for sample in samples if not isinstance(sample, Broken)]
    images = torch.stack([image for image, _ in good]) if good else None
    return PictureBatch(images, [record for _, record in good], [s for s in samples if isinstance(s, Broken)])
