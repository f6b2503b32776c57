"""Checkpoints that are whole or absent, and load without running code from the file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from limber_fast import checks, files
from limber_fast.files import broken, reason


@dataclass(frozen=True)
class Layout:
    """A kind of checkpoint: its name and version, and exactly the keys that are written; `added` ones came later, and
    files without them are still read."""

    format: str
    keys: frozenset[str]
    added: frozenset[str] = frozenset()


SMALL_CLIP = Layout(
    "limber_fast.small_clip/3",
    frozenset({"train_config", "model_config", "words", "model", "average", "optimizers", "step", "seconds", "locked",
               "images", "image_seconds", "history"}),
)  # fmt: skip
LIMBER = Layout(
    "limber_fast.limber_training/1",
    frozenset({"config", "processes", "parameters", "encoder", "optimizer", "step", "seconds", "history",
               "skipped"}),
    frozenset({"skipped"}),
)  # fmt: skip
CLIP = Layout(
    "limber_fast.clip_training/1",
    frozenset({"config", "model", "optimizer", "step", "seconds", "history", "skipped", "left_out"}),
    frozenset({"skipped", "left_out"}),
)
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
    if missing := layout.keys - layout.added - set(state):
        raise CheckpointError(f"{path}: the checkpoint lacks {', '.join(sorted(missing))}")
    return state


def load_alike(path: Path, layout: Layout) -> dict | None:
    """The checkpoint that all processes of a group go on from, each of which reads it; None where there is none.

    Raises: CheckpointError in all of them where one finds another file than the first one does, or cannot read it.
    """
    state, wrong = None, None
    try:
        state = load_checkpoint(path, layout)
    except FileNotFoundError:
        pass
    except CheckpointError as error:
        wrong = error
    if dist.is_initialized():
        # The time spent tells runs apart that stopped at the same step.
        mine = None if state is None else (state["step"], state["seconds"])
        seen = [(mine, wrong and str(wrong))] * dist.get_world_size()
        dist.all_gather_object(seen, seen[0])
        if (other := next((i for i, x in enumerate(seen) if x != seen[0]), None)) is not None:
            found = " and ".join(f"{_told(*seen[i])} in process {i}" for i in (0, other))
            remedy = "share the output folder, or copy the file to every machine"
            raise checks.invalid(str(path), "the file", "be the same for all processes", found, remedy, CheckpointError)
    if wrong is not None:
        raise wrong
    return state


def _told(spent: tuple[int, float] | None, wrong: str | None) -> str:
    if spent is None:
        return "none" if wrong is None else "an unreadable one"
    return f"step {spent[0]} after {spent[1]:.3g} s"
