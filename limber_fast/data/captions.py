"""Images with captions: COCO's JSON, NoCaps' JSON with its domains, and the folders that LiMBeR trains from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from limber_fast.data.index import Index

DOMAINS = ("in-domain", "near-domain", "out-domain")


@dataclass(frozen=True)
class CaptionedImage:
    """Where an image lies and what people say of it.

    Attributes:
        image_id: the index's own name of it.
        image: the file, which nobody has opened yet, or its content where it came in a shard.
        captions: none where the index has none, as a test split.
        domain: NoCaps' domain, else "".
    """

    image_id: int | str
    image: Path | bytes
    captions: tuple[str, ...]
    domain: str = ""


def read_coco_captions(index: str | Path, images: str | Path) -> list[CaptionedImage]:
    """Every image of a COCO captions file in its order, with the captions in theirs.

    Args:
        index: `captions_val2014.json` and the like: `images` with `id` and `file_name`, `annotations` with `image_id`
            and `caption`.
        images: the folder of the files.
    Raises: BrokenIndex with file and line; OSError where a file or the folder is missing.
    """
    return _read(index, images, domains=False)


def read_nocaps(index: str | Path, images: str | Path) -> list[CaptionedImage]:
    """As `read_coco_captions`; every image also has a `domain`: in-domain, near-domain or out-domain."""
    return _read(index, images, domains=True)


def _read(index: str | Path, images: str | Path, *, domains: bool) -> list[CaptionedImage]:
    file, folder = Index(index), existing_folder(images)
    found: dict[int | str, tuple[Path, str]] = {}
    for row, entry in enumerate(file.entries("images")):
        name = file.field(entry, "id", int, str, key="images", row=row)
        if name in found:
            raise file.broken(f"a second image with id {name!r}", "images", row)
        domain = file.field(entry, "domain", str, key="images", row=row) if domains else ""
        if domains and domain not in DOMAINS:
            raise file.broken(f"'domain' must be one of {', '.join(DOMAINS)}; found {domain!r}", "images", row)
        path = file.inside(folder, file.field(entry, "file_name", str, key="images", row=row), "images", row)
        found[name] = (path, domain)
    captions: dict[int | str, list[str]] = {name: [] for name in found}
    for row, entry in enumerate(file.entries("annotations") if "annotations" in file.content else ()):
        name = file.field(entry, "image_id", int, str, key="annotations", row=row)
        if name not in captions:
            raise file.broken(f"no image has id {name!r}", "annotations", row)
        captions[name].append(file.field(entry, "caption", str, key="annotations", row=row))
    return [CaptionedImage(name, path, tuple(captions[name]), domain) for name, (path, domain) in found.items()]


def read_limber_folder(root: str | Path) -> Iterator[CaptionedImage]:
    """LiMBeR's training layout, in the order of its file names: `image_data/<n>/*.json` beside `images/<n>/*.jpg`.

    Each JSON file is one image: `image_path`, relative to `root`, and `captions`, at least one; other keys are left.

    Raises: BrokenIndex with file and line, when it gets there; OSError for a folder that is missing.
    """
    folder = existing_folder(root)
    for path in sorted(existing_folder(folder / "image_data").glob("*/*.json")):
        file = Index(path)
        captions = file.strings(file.content, "captions")
        if not captions:
            raise file.broken("'captions' must not be empty")
        image = file.inside(folder, file.field(file.content, "image_path", str))
        yield CaptionedImage(path.relative_to(folder / "image_data").with_suffix("").as_posix(), image, captions)


def existing_folder(path: str | Path) -> Path:
    if not Path(path).is_dir():
        raise NotADirectoryError(f"{path}: no such folder")
    return Path(path)
