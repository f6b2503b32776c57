"""The demo's page and result.json."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from limber_fast import checks, files
from limber_fast.data import emoji
from limber_fast.evaluation.emoji import Evaluation
from limber_fast.report import charts, page
from limber_fast.report.images import png
from limber_fast.report.loss_timing import FEATURES, Point

ROW_NAMES = {
    "seen": "seen concepts",
    "unseen_name": "unseen concepts, name as prompt",
    "unseen_name_and_tags": "unseen concepts, name + tags",
    "unseen_languages": "unseen concepts, name + tags in 8 languages",
    "unseen_everything": "unseen concepts, the same + subgroup",
    "unseen_among_all": "unseen concepts among all names",
}
KNOWN = ("seen", "unseen")
ZERO_SHOT_HEADER = (
    "test on fluent-emoji-flat", "images", "names", "CLIP top-1", "CLIP top-5", "pixels top-1", "pixels top-5", "chance"
)  # fmt: skip
TIMING_HEADER = ("N", "dtype", "eager", "limber_fast", "faster", "eager memory", "limber_fast memory", "less")
ZERO_SHOT_NOTE = (
    "Percent. A class is the normalised mean of its prompts' features. Ties count as wrong. Pixels: the concept of the "
    "training drawing with the most alike pixels; it cannot name what no vendor drew for it. Unseen concepts are held "
    "out by family: no sibling in another gender, direction or colour was trained on. Eight languages: English and the "
    "names and tags that CLDR has in German, Spanish, French, Hungarian, Italian, Dutch and Portuguese, a prompt each."
)
CREDITS_NOTE = "The drawings, scaled to 32 x 32 pixels, are by:"
CONFUSION_NOTE = "Percent of each row; all test images, all names."


def zero_shot_rows(found: Evaluation) -> list[list[str]]:
    """The zero-shot table, percent; a dash where the baseline has no answer (a concept it never saw)."""
    rows = []
    for key, name in ROW_NAMES.items():
        row = found.tables[key]
        pixel = [f"{row['pixel'][k]:.1f}" if "pixel" in row else "-" for k in ("top1", "top5")]
        best = [f"{row[k]:.1f}" for k in ("top1", "top5")]
        rows.append([name, str(row["images"]), str(row["classes"]), *best, *pixel, f"{row['chance']['top1']:.2f}"])
    return rows


def timing_rows(points: Sequence[Point]) -> list[list[str]]:
    """One row per size and dtype with both ratios; a skipped point shows why."""
    by_key = {(p.n, p.dtype, p.implementation): p for p in points}
    rows = []
    for n, dtype in dict.fromkeys((p.n, p.dtype) for p in points):
        eager, fused = (by_key.get((n, dtype, name)) for name in ("eager", "limber_fast"))
        rows.append([str(n), dtype, _time(eager), _time(fused), _ratio(eager, fused, "seconds"),
                     _memory(eager), _memory(fused), _ratio(eager, fused, "peak_mib")])  # fmt: skip
    return rows


def _time(point: Point | None) -> str:
    if point is None or point.skipped:
        return "skipped"
    return f"{point.seconds:.2f} s" if point.seconds >= 1 else f"{1e3 * point.seconds:.1f} ms"


def _memory(point: Point | None) -> str:
    return "skipped" if point is None or point.skipped else f"{point.peak_mib:.0f} MiB"


def _ratio(eager: Point | None, fused: Point | None, field: str) -> str:
    pair = [getattr(p, field) for p in (eager, fused) if p is not None and not p.skipped]
    return f"{pair[0] / pair[1]:.2f}x" if len(pair) == 2 and pair[1] > 0 else "-"


def _finite(name: str, value: Any) -> None:
    """null stands for what this run does not have; a number that is not finite is a fault, and must not read so."""
    if isinstance(value, dict):
        for key, item in value.items():
            _finite(f"{name}.{key}", item)
    elif isinstance(value, (list, tuple)):
        for at, item in enumerate(value):
            _finite(f"{name}[{at}]", item)
    elif isinstance(value, float) and not math.isfinite(value):
        raise checks.invalid("result.json", name, "be finite", str(value))


def write_result(path: Path, run: dict, found: Evaluation, limber: dict, points: Sequence[Point]) -> dict:
    """result.json: every figure of the page; `run` holds settings, machine and training facts.

    Raises: ValueError for a figure that is not finite.
    """
    result = {
        **run,
        "zero_shot": found.tables,
        "linear_probe_group": found.probe,
        "limber": limber,
        "confusion_by_group": {"groups": found.groups, "counts": found.confusion.tolist()},
        "loss_timing": [asdict(point) for point in points],
    }
    for name, value in result.items():
        _finite(name, value)
    files.replace(path, json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return result


def write_report(
    path: Path, run: dict, history: Sequence[dict], found: Evaluation, limber: str, points: Sequence[Point]
) -> None:
    """report.html, one file without external resources; `limber` is the section of demo_limber."""
    cards = [page.card(png(example.image), example.name, example.guesses) for example in found.examples]
    drawn = "Random test images with the five best of all names; the bar is the probability, the right name is marked."
    curve = page.chart(charts.training_curve(history), "Loss, accuracy in the batch and logit scale over the minutes")
    matrix = page.chart(charts.confusion(found.groups, found.confusion), "Group of the image against its best name")
    content = (
        "<h1>A small CLIP learns emoji</h1>",
        page.paragraph(_lead(run, found.tables), "lead"),
        page.section("training", "Training curve", curve, page.paragraph(_training_note(run), "note")),
        page.section("zero-shot", "Zero-shot classification", *_zero_shot(found)),
        page.section("examples", "What it says", page.paragraph(drawn), page.grid(cards)),
        page.section("confusion", "Confusion by group", matrix, page.paragraph(CONFUSION_NOTE, "note")),
        limber,
        page.section("loss", "The loss: eager PyTorch against limber_fast", *_loss(points, run["threads"])),
        page.section("machine", "This machine", page.table(("", ""), list(run["machine"].items()))),
        page.section("credits", "Credits", page.paragraph(CREDITS_NOTE), *_credits()),
    )
    files.replace(path, page.page("limber_fast demo", *content))


def _lead(run: dict, tables: dict[str, dict]) -> str:
    training, seen, unseen = run["training"], tables["seen"], tables["unseen_languages"]
    return (
        f"In {training['seconds'] / 60:.1f} minutes on {_threads(run['threads'])} a small CLIP "
        f"({training['parameters'] / 1e6:.2f} M parameters) saw {training['images']:,} augmented drawings by five "
        f"vendors with their captions. On a sixth vendor's style, never trained on, it names {seen['top1']:.1f}% of "
        f"the images right among {seen['classes']} names; nearest neighbour in pixels {seen['pixel']['top1']:.1f}%. "
        f"Among {unseen['classes']} concepts that no drawing it trained on shows, {unseen['top1']:.1f}%."
    )


def _credits() -> list[str]:
    return [page.paragraph(line, "note") for line in emoji.credits()]


def _threads(count: int) -> str:
    return "1 CPU thread" if count == 1 else f"{count} CPU threads"


def _training_note(run: dict) -> str:
    training = run["training"]
    return (
        f"{training['images'] // training['batch']} steps of {training['batch']} images, "
        f"{training['images_per_second']:.0f} images/s; then the image tower is locked, and the text tower alone takes "
        f"{training['steps'] - training['images'] // training['batch']} steps, on captions in eight languages. "
        f"Loss: info_nce, backend {run['loss']}; equal concepts are never each other's negatives."
    )


def _zero_shot(found: Evaluation) -> list[str]:
    header = ("linear probe: group of the concept", "accuracy", "most frequent group")
    probe = [[f"{name} concepts", *(f"{found.probe[key]:.1f}" for key in (name, f"{name}_majority"))] for name in KNOWN]
    note = f"Logistic regression by L-BFGS on frozen image features, C = {found.probe['C']:g} from held-out families."
    return [
        page.table(ZERO_SHOT_HEADER, zero_shot_rows(found)),
        page.paragraph(ZERO_SHOT_NOTE, "note"),
        page.table(header, probe),
        page.paragraph(note, "note"),
    ]


def _loss(points: Sequence[Point], threads: int) -> list[str]:
    if not points:
        return [page.paragraph("Not measured in this run.")]
    skipped = [f"N = {p.n}, {p.dtype}, {p.implementation}: {p.skipped}." for p in points if p.skipped]
    note = (
        f"One forward and backward pass over two [N, {FEATURES}] towers and the scale, {_threads(threads)}, "
        f"each point in a process of its own; memory is the rise of its peak."
    )
    return [
        page.chart(charts.loss_cost(points), "Time and peak memory of the loss against the batch size"),
        page.table(TIMING_HEADER, timing_rows(points)),
        page.paragraph(" ".join([note, *(["Skipped:"] if skipped else []), *skipped]), "note"),
    ]
