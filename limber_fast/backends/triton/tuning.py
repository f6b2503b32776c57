"""Choices timed on this machine's own GPU, kept between runs; only where LIMBER_FAST_AUTOTUNE=1 asks for it.

Without it the table's own row is taken and nothing is read, timed or written. Candidates differ in what leaves the
build as it is, such as the number of programs: nothing that has not been through the compile gate is ever timed.

The file is `$XDG_CACHE_HOME/limber_fast/autotune.json` (`~/.cache` by default), in a folder of the user's alone (mode
0700). One that others own or may write is refused: what stands in it decides what runs here.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from limber_fast import files

ENVIRONMENT_VARIABLE = "LIMBER_FAST_AUTOTUNE"
_FORMAT = "limber_fast.autotune/1"
_chosen: dict[str, str] = {}


def asked() -> bool:
    """Whether LIMBER_FAST_AUTOTUNE=1 is set.

    Raises:
        ValueError: it is something else than 0 or 1.
    """
    value = os.environ.get(ENVIRONMENT_VARIABLE, "0")
    if value not in ("0", "1", ""):
        raise ValueError(f"{ENVIRONMENT_VARIABLE} must be 0 or 1; got {value!r}")
    return value == "1"


def choose(key: str, candidates: Sequence[str], measure: Callable[[str], float]) -> str:
    """The candidate that was fastest for `key` on this machine: kept from before, else timed now and kept.

    Args:
        key: chip, versions and problem; whatever changes the times.
        measure: seconds of a candidate.
    """
    if key not in _chosen:
        folder = private_folder()
        kept = read(folder).get(key)
        if kept not in candidates:
            kept = min(candidates, key=measure)
            with _locked(folder):
                _write(folder, read(folder) | {key: kept})
        _chosen[key] = kept
    return _chosen[key]


def private_folder() -> Path:
    """The folder of the cache, of mode 0700.

    Raises:
        PermissionError: somebody else owns it or may write to it.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "limber_fast"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(
            f"{ENVIRONMENT_VARIABLE}: {folder} must be a folder that only you can write to; found "
            f"{stat.filemode(found.st_mode)} of user {found.st_uid}; remove it, or chmod 700 your own"
        )
    if found.st_mode & 0o077:  # others could read it
        folder.chmod(0o700)
    return folder


def read(folder: Path) -> dict[str, str]:
    """What was kept; nothing where the file is missing, unreadable or of another format: it is only a cache."""
    try:
        found = json.loads((folder / "autotune.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    kept = found.get("chosen") if isinstance(found, dict) and found.get("format") == _FORMAT else None
    if not isinstance(kept, dict):
        return {}
    return {key: value for key, value in kept.items() if isinstance(value, str)}


def _write(folder: Path, kept: dict[str, str]) -> None:
    text = json.dumps({"format": _FORMAT, "chosen": kept}, indent=1, sort_keys=True)
    files.replace(folder / "autotune.json", text)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One writer at a time: what another process adds between reading and writing is not lost."""
    import fcntl  # not on every system that imports this package

    with open(folder / "autotune.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
