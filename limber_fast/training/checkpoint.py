"""Checkpoints that are whole or absent, and load without running code from the file."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import torch

FORMAT = "limber_fast.small_clip/3"
_KEYS = {
    "format", "train_config", "model_config", "words", "model", "average", "optimizers", "step", "seconds", "locked",
    "images", "image_seconds", "history",
}  # fmt: skip


class CheckpointError(ValueError):
    """The file is not a checkpoint of this format; the message says what was found."""


def save_checkpoint(path: Path, state: dict) -> None:
    """Write `state` under a temporary name, flush it to disk, then rename: a crash leaves the old file or the new one.

    Raises: ValueError for a state whose keys are not the format's.
    """
    state = {"format": FORMAT, **state}
    if set(state) != _KEYS:
        raise ValueError(f"save_checkpoint: keys differ from the format's: {sorted(set(state) ^ _KEYS)}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint with `weights_only=True`: tensors, numbers and strings, never code.

    Raises: CheckpointError for a truncated or foreign file; FileNotFoundError where there is none.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path}: not a readable checkpoint ({str(error).splitlines()[0]})") from error
    found = state.get("format") if isinstance(state, dict) else type(state).__name__
    if found != FORMAT:
        raise CheckpointError(f"{path}: expected format {FORMAT!r}; found {found!r}")
    if missing := _KEYS - set(state):
        raise CheckpointError(f"{path}: the checkpoint lacks {', '.join(sorted(missing))}")
    return state
