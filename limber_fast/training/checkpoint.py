"""Checkpoints that are whole or absent, and load without running code from the file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from limber_fast import files
from limber_fast.files import broken, reason


@dataclass(frozen=True)
class Layout:
    """A kind of checkpoint: its name and version, and exactly the keys that it holds."""

    format: str
    keys: frozenset[str]


SMALL_CLIP = Layout(
    "limber_fast.small_clip/3",
    frozenset({"train_config", "model_config", "words", "model", "average", "optimizers", "step", "seconds", "locked",
               "images", "image_seconds", "history"}),
)  # fmt: skip
LIMBER = Layout(
    "limber_fast.limber_training/1",
    frozenset({"config", "processes", "parameters", "encoder", "optimizer", "step", "seconds", "history"}),
)

CLIP = Layout("limber_fast.clip_training/1", frozenset({"config", "model", "optimizer", "step", "seconds", "history"}))
ENCODER = Layout("limber_fast.small_encoder/1", frozenset({"config", "kind", "model"}))


class CheckpointError(ValueError):
    """The file is not a checkpoint of this format; the message says what was found."""


def save_checkpoint(path: Path, state: dict, layout: Layout = SMALL_CLIP) -> None:
    """Write `state`: a crash leaves the old file or the new one.

    Raises: ValueError for a state whose keys are not the format's.
    """
    if set(state) != layout.keys:
        raise ValueError(f"save_checkpoint: keys differ from the format's: {sorted(set(state) ^ layout.keys)}")
    state = {"format": layout.format, **state}
    with files.replacing(path) as temporary:
        torch.save(state, temporary)


def load_checkpoint(path: Path, layout: Layout = SMALL_CLIP) -> dict:
    """Read a checkpoint with `weights_only=True`: tensors, numbers and strings, never code.

    Raises: CheckpointError for a truncated or foreign file; FileNotFoundError where there is none.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except broken() as error:
        raise CheckpointError(f"{path}: not a readable checkpoint ({reason(error)})") from error
    found = state.get("format") if isinstance(state, dict) else type(state).__name__
    if found != layout.format:
        raise CheckpointError(f"{path}: expected format {layout.format!r}; found {found!r}")
    if missing := layout.keys - set(state):
        raise CheckpointError(f"{path}: the checkpoint lacks {', '.join(sorted(missing))}")
    return state
