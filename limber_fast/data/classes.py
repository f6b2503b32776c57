"""Images with one class each: a folder of classes, and the shipped emoji."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from limber_fast.data.captions import existing_folder
from limber_fast.data.emoji import EmojiDataset, concepts
from limber_fast.data.index import BrokenIndex, Index

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class LabelledImage:
    """Where an image lies, or its content, and the class it belongs to.

    Attributes:
        label: index into the classes' names. group: what it is reported under beside `all`, else "".
        family: images that belong together when some are held out, else "".
    """

    image_id: str
    image: Path | bytes
    label: int
    group: str = ""
    family: str = ""


def read_class_folder(
    root: str | Path, names: str | Path | None = None, folders: Sequence[str] | None = None
) -> tuple[list[LabelledImage], list[str], list[str]]:
    """The images below `root / CLASS /`, in the order of their names; classes in the order of theirs.

    Args:
        names: a JSON object from folder to what the class is called; by default the folder's name, _ being a space.
        folders: the classes of another folder, whose labels these are then; all have to be among them.
    Returns: (images, names of the classes, their folders).
    Raises: BrokenIndex where there is no image, or a folder without a name; OSError where `root` is missing.
    """
    root = existing_folder(root)
    found = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    known = found if folders is None else list(folders)
    if unknown := [name for name in found if name not in known]:
        raise BrokenIndex(f"{root}: class {unknown[0]!r} is not among the {len(known)} classes of the other folder")
    labels = {name: i for i, name in enumerate(known)}
    images = [
        LabelledImage(f"{name}/{path.relative_to(root / name).as_posix()}", path, labels[name])
        for name in found
        for path in sorted((root / name).rglob("*")) if path.suffix.lower() in SUFFIXES
    ]  # fmt: skip
    if not images:
        raise BrokenIndex(f"{root}: no images; they have to lie in one folder per class")
    called = {name: name.replace("_", " ") for name in known}
    if names is not None:
        file = Index(names)
        called = {name: file.field(file.content, name, str) for name in known}
    return images, [called[name] for name in known], known


def emoji_images(dataset: EmojiDataset, *, by_group: bool = False) -> tuple[list[LabelledImage], list[str]]:
    """The shipped drawings with their concept as class (or its Unicode group), seen and unseen concepts as groups.

    Returns: (images, names of the classes); concepts without a drawing in `dataset` are no classes.
    """
    known = concepts()
    keys = [known[int(i)].group if by_group else int(i) for i in dataset.concept]
    classes = list(dict.fromkeys(c.group for c in known)) if by_group else sorted(set(keys))
    labels = {key: i for i, key in enumerate(classes)}
    images = []
    for row, key in enumerate(keys):
        picture, index = dataset[row]
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", compress_level=1)
        concept, seen = known[index], "unseen" if known[index].held_out else "seen"
        images.append(LabelledImage(concept.slug, buffer.getvalue(), labels[key], seen, concept.family))
    return images, classes if by_group else [known[i].name for i in classes]
