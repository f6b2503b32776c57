"""`limber-fast demo`: train a small CLIP on emoji art within a time budget, test it on another vendor, report."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch

from limber_fast import files, miniature
from limber_fast.console import Console
from limber_fast.data.emoji import concepts
from limber_fast.demo_limber import Fit
from limber_fast.dispatch import explain
from limber_fast.environment import collect
from limber_fast.evaluation.emoji import Evaluation, TestSet, evaluate
from limber_fast.evaluation.emoji_limber import ASKED, Benchmark
from limber_fast.models.clip import SmallClip, SmallClipConfig
from limber_fast.models.tokenizer import WordTokenizer
from limber_fast.optional import needed
from limber_fast.report import demo_limber as limber_report
from limber_fast.report.demo import (
    TIMING_HEADER,
    ZERO_SHOT_HEADER,
    timing_rows,
    write_report,
    write_result,
    zero_shot_rows,
)
from limber_fast.report.loss_timing import SIZES, Point, sweep
from limber_fast.training.batches import ConceptBatches
from limber_fast.training.captions import CaptionSampler
from limber_fast.training.checkpoint import load_checkpoint
from limber_fast.training.config import TrainConfig
from limber_fast.training.drawings import Drawings
from limber_fast.training.interrupt import EXIT_CODE
from limber_fast.training.trainer import Trainer

FAILED = 1
# Seconds of what follows 5 minutes of training, and those of them for scores and page at the end, so that all of
# `limber-fast demo` stays within 8 minutes: where they are short, LiMBeR's last rows are left out, and the loss is
# timed for less.
REST, PAGE = 170, 10
# The loss is timed for a fifth of the training time.
TIMING_SHARE = 1 / 5
# Of the training time, for each projection of LiMBeR.
LIMBER_SHARE = 0.12


def build_trainer(config: TrainConfig, train: Drawings) -> Trainer:
    """Model, vocabulary and batches for `train`, from the config's seed."""
    torch.manual_seed(config.seed)
    known = concepts()
    texts = CaptionSampler(config.locked_captions).all_texts(known[i] for i in torch.unique(train.concept).tolist())
    tokenizer = WordTokenizer.from_captions(texts, SmallClipConfig.context_length)
    batches = ConceptBatches(train.images, train.concept.tolist(), known, tokenizer, config)
    return Trainer(SmallClip(SmallClipConfig(vocab_size=tokenizer.vocab_size)), tokenizer, batches, config)


def load_model(checkpoint: Path) -> tuple[SmallClip, WordTokenizer]:
    """The averaged model of a checkpoint in evaluation mode, and its tokenizer."""
    state = load_checkpoint(checkpoint)
    config = SmallClipConfig(**state["model_config"])
    model = SmallClip(config)
    model.load_state_dict({**state["model"], **state["average"]})
    return model.eval(), WordTokenizer(state["words"], config.context_length)


def main(args: argparse.Namespace, console: Console) -> int:
    """Run the demo; args: minutes, steps, seed, output, resume, full, threads, loss. Returns the exit code."""
    needed("transformers", "demo")  # before the training, not behind it
    if args.threads:
        torch.set_num_threads(args.threads)
    folder, test_set, trainers = Path(args.output), TestSet.shipped(), []
    seeds = range(args.seed, args.seed + (miniature.SEEDS if args.full else 1))
    folders = [folder, *(folder / f"seed-{seed}" for seed in seeds[1:])]
    for seed, place in zip(seeds, folders, strict=True):
        config = TrainConfig(minutes=args.minutes, steps=args.steps, seed=seed, backend=args.loss)
        trainers.append(trainer := build_trainer(config, test_set.train))
        if (code := _trained(trainer, place, args.resume, console)) != 0:
            return code
    try:
        _report(args, trainers, folders, test_set, console)
    except ValueError as error:  # scores that are not finite
        console.error(str(error))
        return FAILED
    return 0


def rest(config: TrainConfig, full: bool) -> float:
    """Seconds from the end of the training to the last measurement; no end where a run is to be the same on every
    machine, or whole."""
    return math.inf if full or config.steps else REST * max(1.0, config.minutes / 5) - PAGE


def _report(
    args: argparse.Namespace, trainers: list[Trainer], folders: list[Path], test_set: TestSet, console: Console
) -> None:
    """Tests what was trained, times the loss and writes the page into the first folder."""
    folder, trainer, config = folders[0], trainers[0], trainers[0].config
    until = time.monotonic() + rest(config, args.full)
    console.print("testing on fluent-emoji-flat")
    found = evaluate(trainer.averaged_model(), trainer.tokenizer, test_set, seed=config.seed)
    console.table("Zero-shot, percent", ZERO_SHOT_HEADER, zero_shot_rows(found))
    asked = ASKED if config.minutes >= 1 else ASKED // 5
    benchmark = Benchmark(test_set.train, test_set.test, asked=asked)
    limber = miniature.run(
        trainers, test_set, benchmark, folders, lambda c: Fit(LIMBER_SHARE * 60 * c.minutes, c.seed, asked),
        full=args.full, console=console, until=until,
    )  # fmt: skip
    console.table("LiMBeR, percent", limber_report.HEADER, limber_report.table(limber))
    points = _time_loss(config, until, console)
    console.table("Loss, forward + backward", TIMING_HEADER, timing_rows(points))
    _write(folder, trainer, found, (limber, benchmark), points)
    console.print(f"{folder / 'report.html'}")


def _trained(trainer: Trainer, folder: Path, resume: bool, console: Console) -> int:
    """Trains, or goes on; the exit code where the demo ends here, else 0."""
    checkpoint, config = folder / "checkpoint.pt", trainer.config
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if resume and checkpoint.exists():
            trainer.restore(load_checkpoint(checkpoint))
            console.print(f"resumed at step {trainer.step}, {trainer.budget.spent / 60:.1f} minutes spent")
    except ValueError as error:  # not a checkpoint, or one of other sizes
        console.error(f"{error}; run without --resume to start anew")
        return FAILED
    drawings, seen = len(trainer.batches.images), len(trainer.batches.drawn)
    budget = f"{config.steps} steps" if config.steps else f"{config.minutes:g} minutes"
    console.print(f"{drawings} drawings of {seen} concepts, {budget} on {torch.get_num_threads()} threads")
    if trainer.fraction >= 1:
        console.print(f"nothing left to train: step {trainer.step} is past the budget")
    if not _train(trainer, folder, console):
        console.print(f"stopped at step {trainer.step}; {checkpoint} is whole: go on with --resume")
        return EXIT_CODE
    return 0


def _train(trainer: Trainer, folder: Path, console: Console) -> bool:
    with console.progress("training", 1.0) as update:

        def watch(fraction: float, values: dict[str, float]) -> None:
            update(fraction, step=trainer.step, loss=values["loss"], scale=values["scale"], accuracy=values["accuracy"])

        return trainer.run(folder, watch)


def _time_loss(config: TrainConfig, until: float, console: Console) -> list[Point]:
    start, points = time.monotonic(), []
    budget = min(TIMING_SHARE * 60 * config.minutes, max(until - start, 1.0))  # a second measures the first size
    with console.progress("timing the loss", len(SIZES) * 4) as update:
        for point in sweep(torch.get_num_threads(), budget, "auto" if config.backend == "eager" else config.backend):
            points.append(point)
            update(len(points), N=point.n, dtype=point.dtype, seconds=time.monotonic() - start)
    return points


def _write(
    folder: Path, trainer: Trainer, found: Evaluation, limber: tuple[miniature.Miniature, Benchmark],
    points: list[Point],
) -> None:  # fmt: skip
    environment = collect()
    chosen = "eager" if trainer.config.backend == "eager" else explain("info_nce", "cpu")[0]
    batch = trainer.config.concepts_per_batch * trainer.config.images_per_concept
    seconds = trainer.budget.spent
    run = {
        "settings": trainer.config.to_dict(),
        "threads": torch.get_num_threads(),
        "loss": chosen,
        "training": {
            "steps": trainer.step,
            "seconds": seconds,
            "batch": batch,
            "images": trainer.images,
            "images_per_second": trainer.images / trainer.image_seconds,
            "image_seconds": trainer.image_seconds,
            "parameters": sum(p.numel() for p in trainer.model.parameters()),
            "last": trainer.history.rows[-1],
        },
        "machine": {
            "processor": environment["cpu"]["model"],
            "kernels": environment["cpu"]["isa"] or "none built",
            "threads": str(torch.get_num_threads()),
            "platform": environment["platform"],
            **{name: version for name, version in environment["versions"].items() if version},
        },
    }
    write_result(folder / "result.json", run, found, limber[0].facts(), points)
    files.replace(folder / "table.md", limber_report.markdown(limber[0]))
    write_report(folder / "report.html", run, trainer.history.rows, found, limber_report.section(*limber), points)
