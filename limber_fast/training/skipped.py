"""Broken pictures that training met: what every process skipped, and skipped.txt."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from limber_fast import files


def of_all(mine: dict[Any, str]) -> dict[Any, str]:
    """What any process skipped, sorted. Every process of a group calls it."""
    found = [mine]
    if dist.is_initialized():
        found *= dist.get_world_size()
        dist.all_gather_object(found, mine)
    return dict(sorted((key, reason) for share in found for key, reason in share.items()))


def write(folder: Path, lines: Iterable[str]) -> None:
    """skipped.txt with a picture a line; where there are none there is no file."""
    path, lines = folder / "skipped.txt", sorted(lines)
    if lines:
        files.replace(path, "\n".join(lines) + "\n")
    else:
        path.unlink(missing_ok=True)
