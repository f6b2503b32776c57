"""`limber-fast evaluate zero-shot | linear-probe`: an image model on classified images."""

from __future__ import annotations

import argparse
import string
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from limber_fast.console import Console
from limber_fast.data.classes import LabelledImage, emoji_images, read_class_folder
from limber_fast.data.emoji import TEST_STYLE, EmojiDataset
from limber_fast.data.index import BrokenIndex
from limber_fast.data.pictures import Skipped
from limber_fast.evaluation.classes import score_classes
from limber_fast.evaluation.predictions import MODEL, Scored
from limber_fast.evaluation.towers import Towers, encode_images, towers
from limber_fast.evaluation.zero_shot import class_features, similarities
from limber_fast.models.encoders import weights_of
from limber_fast.report.evaluation import Shown

EMOJI = "emoji"
HELD_OUT = 0.2  # of the training images, for choosing C, where there is no --validation
Labelled = list[LabelledImage]


def zero_shot(args: argparse.Namespace, skipped: Skipped, console: Console) -> tuple[Scored, list[Shown]]:
    """Every class is the mean of its prompts' text features; beside it the row of the first prompt alone."""
    records, names = _test_images(args)
    found = _towers(args)
    if found.tokenize is None:
        raise BrokenIndex(f"{args.model}: no text tower, which zero-shot needs; try linear-probe")
    templates = _templates(args.templates, found)
    features, kept = _encode(found, records, skipped, args, console)
    features = F.normalize(features, dim=1)
    rows = {MODEL: _similarities(found, features, names, templates, console)}
    if len(templates) > 1:
        rows[f"prompt {templates[0]!r} alone"] = _similarities(found, features, names, templates[:1], console)
    counts = torch.bincount(torch.tensor([record.label for record in kept]), minlength=len(names))
    return score_classes(kept, names, rows, counts, seed=args.seed), _shown(kept, names)


def linear_probe(args: argparse.Namespace, skipped: Skipped, console: Console) -> tuple[Scored, list[Shown]]:
    """Logistic regression on the training images' features, C chosen on images held out of them."""
    from limber_fast.evaluation.linear_probe import fit_probe

    if (args.train == EMOJI) != (args.images == EMOJI):
        raise BrokenIndex("--train and --images must both be emoji, or both folders")
    validation = None
    if args.train == EMOJI:
        train, _ = emoji_images(EmojiDataset(), by_group=True)
        test, names = emoji_images(EmojiDataset(TEST_STYLE, "all"), by_group=True)
        folders = None
    else:
        train, names, folders = read_class_folder(args.train, args.names)
        test, _, _ = read_class_folder(args.images, args.names, folders)
    if args.validation is not None:
        validation, _, _ = read_class_folder(args.validation, args.names, folders)
    found = _towers(args)
    features, kept = _encode(found, train, skipped, args, console, "training images")
    labels = np.array([record.label for record in kept])
    if validation is None:
        held = _held_out(kept, args.seed)
        parts = [(features.numpy()[rows], labels[rows]) for rows in (~held, held)]
    else:
        others, other = _encode(found, validation, skipped, args, console, "validation images")
        parts = [(features.numpy(), labels), (others.numpy(), np.array([record.label for record in other]))]
    if len(set(parts[0][1].tolist())) < 2:
        raise BrokenIndex(f"{args.train}: a probe needs images of two classes or more")
    features, kept = _encode(found, test, skipped, args, console)
    strength, probe = fit_probe(*parts, search=True)
    console.print(f"C = {strength:g}, chosen on {len(parts[1][1])} of {sum(len(y) for _, y in parts)} training images")
    scores = np.full((len(kept), len(names)), -np.inf)
    decided = probe.decision_function(features.numpy())
    if decided.ndim == 1:  # of two classes
        decided = np.stack([-decided, decided], 1)
    scores[:, probe.classes_] = decided
    never = np.setdiff1d([record.label for record in kept], probe.classes_)  # below every class that was trained on
    scores[:, never] = decided.min() - 1
    counts = np.bincount(np.concatenate([y for _, y in parts]), minlength=len(names))
    rows = {MODEL: torch.from_numpy(scores)}
    return score_classes(kept, names, rows, torch.from_numpy(counts), seed=args.seed), _shown(kept, names)


def _test_images(args: argparse.Namespace) -> tuple[Labelled, list[str]]:
    if args.images == EMOJI:
        return emoji_images(EmojiDataset(TEST_STYLE, "all"))
    return read_class_folder(args.images, args.names)[:2]


def _towers(args: argparse.Namespace) -> Towers:
    return towers(args.model, weights_of(args.weights), args.device)


def _encode(
    found: Towers, records: Labelled, skipped: Skipped, args: argparse.Namespace, console: Console,
    what: str = "images",
) -> tuple[Tensor, Labelled]:  # fmt: skip
    before = len(skipped)
    with console.progress(what, len(records)) as update:
        return encode_images(
            found, records, skipped, batch=args.batch_size, progress=lambda done: update(done - before)
        )


def _similarities(
    found: Towers, features: Tensor, names: Sequence[str], templates: Sequence[str], console: Console
) -> Tensor:
    parts = []
    with console.progress("prompts", len(names)) as update:
        for start in range(0, len(names), 16):
            prompts = [[template.format(name) for template in templates] for name in names[start : start + 16]]
            parts.append(class_features(found.model, found.tokenize, prompts, batch=256).float().cpu())
            update(min(start + 16, len(names)))
    return 100 * similarities(features, torch.cat(parts, 1))


def _templates(wanted: str, found: Towers) -> list[str]:
    """A set by name, or a file with one on each line."""
    if wanted == "":
        return list(found.templates)
    if wanted in ("openai", "simple"):
        import open_clip

        sets = {"openai": open_clip.OPENAI_IMAGENET_TEMPLATES, "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES}
        return [template("{}") for template in sets[wanted]]
    lines = Path(wanted).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            fields = [field for _, field, _, _ in string.Formatter().parse(line) if field is not None]
        except ValueError:
            fields = []
        if line.strip() and fields != [""]:
            raise BrokenIndex(f"{wanted}, line {number}: a template has one {{}} for the class; found {line!r}")
    templates = [line.strip() for line in lines if line.strip()]
    if not templates:
        raise BrokenIndex(f"{wanted}: no templates")
    return templates


def _held_out(records: Labelled, seed: int) -> np.ndarray:
    """[N] bool: a fifth of each class, or of the families where there are any, whole."""
    generator = np.random.default_rng(seed)
    held = np.zeros(len(records), bool)
    families = np.array([record.family for record in records])
    if all(families.tolist()):
        names = np.unique(families)
        return np.isin(families, generator.permutation(names)[: max(1, int(HELD_OUT * len(names)))])
    labels = np.array([record.label for record in records])
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        if len(rows) < 2:
            raise BrokenIndex(f"{records[rows[0]].image_id}: the only image of its class; give --validation")
        held[rows[: max(1, int(HELD_OUT * len(rows)))]] = True
    return held


def _shown(records: Labelled, names: Sequence[str]) -> list[Shown]:
    return [Shown(record.image, names[record.label], [("image", record.image_id)]) for record in records]
