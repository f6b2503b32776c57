"""`limber-fast demo --full`, `limber-fast reproduce --miniature`: the papers' rows and figures in small, over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from limber_fast import demo_limber
from limber_fast.console import Console
from limber_fast.demo_limber import CLIP, LABELS, PIXELS, TUNED, Fit, LimberResult, Said
from limber_fast.evaluation.emoji import TestSet
from limber_fast.evaluation.emoji_limber import Benchmark
from limber_fast.evaluation.emoji_transfer import GroupAccuracy, Shift, against_probe, robustness
from limber_fast.models.clip import SmallResNet
from limber_fast.training import other_encoders
from limber_fast.training.checkpoint import ENCODER, CheckpointError, load_checkpoint, save_checkpoint
from limber_fast.training.config import TrainConfig
from limber_fast.training.drawings import Drawings
from limber_fast.training.trainer import Trainer

SEEDS = 3


@dataclass
class Miniature:
    """Of every seed: LiMBeR's rows, and where the other encoders were trained, the figures of CLIP's paper."""

    limber: list[LimberResult] = field(default_factory=list)
    groups: list[list[GroupAccuracy]] = field(default_factory=list)
    shifts: list[list[Shift]] = field(default_factory=list)

    def facts(self) -> dict:
        """For result.json."""
        rows = demo_limber.merged(self.limber)
        return {
            "ceiling": self.limber[0].ceiling,
            "steps": self.limber[0].steps,
            "left_out": self.limber[0].left_out,
            "seconds": sum(found.seconds for found in self.limber),
            "rows": rows,
            "bars": demo_limber.bars(rows),
            "missed_orders": demo_limber.missed_orders(rows),
            "seeds": [found.summaries for found in self.limber],
            "against_probe": [[asdict(x) for x in found] for found in self.groups],
            "robustness": [[asdict(x) for x in found] for found in self.shifts],
        }


def run(
    trainers: Sequence[Trainer], test_set: TestSet, benchmark: Benchmark, folders: Sequence[Path],
    fit: Callable[[TrainConfig], Fit], *, full: bool, console: Console, until: float = math.inf,
) -> Miniature:  # fmt: skip
    """LiMBeR's rows with every trained CLIP; with `full` also those of the other encoders, which train as long as it.

    A seed's captions are scored by the CLIP of the next seed, not by the captioner's own encoder; one CLIP alone has no
    scorer. What lies in the folders is used again where it is of the same weights and settings. `until`: as of
    `demo_limber.run`.
    """
    found = Miniature()
    clips = [(trainer.averaged_model(), trainer.tokenizer) for trainer in trainers]
    for at, (trainer, folder) in enumerate(zip(trainers, folders, strict=True)):
        clip, tokenizer = clips[at]
        towers = {CLIP: clip.visual}
        if full:
            labels, pixels = (
                encoder(kind, test_set.train, trainer.config, folder, console)
                for kind in (other_encoders.LABELS, other_encoders.PIXELS)
            )
            towers |= {LABELS: labels, TUNED: labels, PIXELS: pixels}
            found.groups.append(against_probe(clip, tokenizer, labels, test_set))
            found.shifts.append(robustness(clip, tokenizer, labels, test_set))
        scorer = clips[(at + 1) % len(clips)] if len(clips) > 1 else None
        fitted = fit(trainer.config)
        said = Said(folder / "limber", fitted)
        found.limber.append(demo_limber.run(towers, benchmark, fitted, said, console, scorer, until=until))
    return found


def encoder(kind: str, drawings: Drawings, config: TrainConfig, folder: Path, console: Console) -> SmallResNet:
    """A tower of `other_encoders`, from the folder where it is of the same settings, else trained and saved there."""
    path, settings = folder / f"{kind}.pt", config.to_dict()
    visual = other_encoders.new_encoder(kind)
    try:
        state = load_checkpoint(path, ENCODER)
        if state["config"] == settings and state["kind"] == kind:
            visual.load_state_dict(state["model"])
            return visual.eval().requires_grad_(False)
    except (FileNotFoundError, CheckpointError):
        pass
    with console.progress(f"training on {kind}, seed {config.seed}", 1.0) as update:
        visual = other_encoders.train_encoder(
            kind, drawings, config, watch=lambda fraction, loss: update(fraction, loss=loss)
        )
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, {"config": settings, "kind": kind, "model": visual.state_dict()}, ENCODER)
    return visual
