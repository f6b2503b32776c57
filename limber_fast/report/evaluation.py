"""Scores of prediction files as JSON and as one page with images, predictions and references."""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from limber_fast import __version__, files
from limber_fast.data.pictures import Broken, Skipped, open_image
from limber_fast.evaluation.predictions import ALL, MODEL, Scored
from limber_fast.report import page

SIZE = 288  # pixels of an example's longer side
NOTES = {
    "caption": (
        "CIDEr-D times 100 with document frequency from the references of the whole file, of a domain from its own. "
        "shuffled: the model's captions given to other images. majority: of all these references the one that scores "
        "best as the caption of every image. best reference: of each image the reference that scores highest, itself "
        "among those it is compared with: the ceiling."
    ),
    "vqa": (
        "VQA accuracy: mean over the annotators left out in turn, after the official normalisation; min(n/3, 1): all "
        "annotators at once. majority: the most frequent answer of these very annotators, alone or by question type."
    ),
    "zero-shot": (
        "Percent of images whose class is the first, or among the first five; a tie counts against the model. A class "
        "is the mean of its prompts' features. shuffled: the model's ranking given to other images. majority: the most "
        "frequent classes of these very images."
    ),
    "linear-probe": (
        "Percent of images whose class is the first, or among the first five; a tie counts against the model. Logistic "
        "regression on frozen features, its strength chosen on images held out of training. shuffled: the model's "
        "ranking given to other images. majority: the most frequent classes of the training images."
    ),
}


@dataclass(frozen=True)
class Shown:
    """What the page shows of an entry: its image's file or content, a title, and named lines."""

    image: Path | bytes
    title: str
    lines: list[tuple[str, str]]


def write_result(path: Path, scored: Scored, args: argparse.Namespace, skipped: Skipped) -> dict:
    """evaluation.json: every mean with its 95% interval by group and row, differences to the model, and every entry.

    Means are in percent (CIDEr-D times 100), entries as the metric defines them.
    """
    groups = {}
    for group, index in scored.groups.items():
        rows = {
            row: {
                metric: mean._asdict() | ({} if row == MODEL else {"model_minus_this": more._asdict()})
                for metric, (mean, more) in cells.items()
            }
            for row, cells in scored.intervals(group, seed=args.seed).items()
        }
        groups[group] = {"entries": len(index), "images": len({scored.images[i] for i in index}), "rows": rows}
    settings = {name: str(value) for name, value in vars(args).items() if name not in ("run", "against", "command")}
    result = {
        "limber_fast": __version__,
        "settings": settings | {"against": {name: str(file) for name, file in getattr(args, "against", ())}},
        "groups": groups,
        "skipped": [{"image": image.name, "reason": image.reason} for image in skipped.images],
        "entries": [
            {"id": name} | {row: {"text": texts[i], **_entry(scored, row, i)} for row, texts in scored.texts.items()}
            for i, name in enumerate(scored.ids)
        ],
    }
    files.replace(path, json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return result


def _entry(scored: Scored, row: str, i: int) -> dict[str, float]:
    return {metric: float(values[i]) for metric, values in scored.scores[row].items()}


def table_of(result: dict, group: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows: means with their intervals."""
    rows = result["groups"][group]["rows"]
    header = ["", *rows[MODEL]]
    return header, [
        [row, *(f"{c['mean']:.1f} ({c['low']:.1f}, {c['high']:.1f})" for c in cells.values())]
        for row, cells in rows.items()
    ]


def write_page(
    path: Path, scored: Scored, result: dict, shown: Sequence[Shown], args: argparse.Namespace, skipped: Skipped
) -> None:
    """evaluation.html, one file without external resources; random examples, not chosen ones."""
    count = min(max(args.examples, 0), len(shown))
    chosen = np.sort(np.random.default_rng(args.seed).permutation(len(shown))[:count])
    cards = [_card(scored, shown[i], i) for i in chosen]
    tables = [
        page.section(
            f"scores-{number}",
            "All" if group == ALL else group,
            page.paragraph(
                f"{result['groups'][group]['entries']} entries, {result['groups'][group]['images']} images."
            ),
            page.table(*table_of(result, group)),
        )
        for number, group in enumerate(sorted(scored.groups, key=lambda group: group != ALL))
    ]
    metric, best = next(iter(result["groups"][ALL]["rows"][MODEL].items()))
    lead = "{} {mean:.1f}, 95% interval {low:.1f} to {high:.1f}, {} entries.".format(metric, len(scored.ids), **best)
    content = (
        f"<h1>{page.escape(args.predictions.name if 'predictions' in args else args.model)}</h1>",
        page.paragraph(lead, "lead"),
        page.paragraph(NOTES[args.task] + " Intervals: 95%, resampled images.", "note"),
        *tables,
        page.section("examples", "Random examples", page.grid(cards)),
        *([page.section("skipped", "Broken images", page.paragraph(str(skipped)))] if len(skipped) else []),
    )
    files.replace(path, page.page("limber_fast evaluation", *content))


def _card(scored: Scored, shown: Shown, i: int) -> str:
    lines = []
    for row, texts in scored.texts.items():
        metric, values = next(iter(scored.scores[row].items()))
        lines.append((row, f"{texts[i]} ({metric} {scored.scales.get(metric, 100) * values[i]:.0f})"))
    image = open_image(shown.image)
    if isinstance(image, Broken):
        return page.photo(None, shown.title, [*lines, *shown.lines, ("no image", image.reason)])
    image.thumbnail((SIZE, SIZE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return page.photo(page.data_uri(buffer.getvalue(), "image/jpeg"), shown.title, [*lines, *shown.lines])
