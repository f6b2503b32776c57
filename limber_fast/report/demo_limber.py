"""The demo page's section on LiMBeR: the paper's table in miniature, its bars, captions right and wrong."""

from __future__ import annotations

import random

from limber_fast.demo_limber import LimberResult, bars
from limber_fast.evaluation.emoji_limber import SHOTS, Benchmark
from limber_fast.report import page
from limber_fast.report.images import png

HEADER = ("", "CIDEr-D", "names, seen", "names, unseen", *(f"group, {n} shots" for n in SHOTS))
KINDS_HEADER = ("0 / 1 / 2 / 4 shots", "group", "subgroup", "colour", "gender", "tone")
NOTE = (
    "Percent; CIDEr-D times 100; 95% intervals over resampled drawings of this one run. A frozen GPT-J of 2.4 M "
    "parameters, trained on text alone, is given four soft prompts of a drawing, each a linear map of the image "
    "tower's 2 x 2 features; the maps are fitted on naming the training vendors' drawings, and on nothing else. All "
    "rows are of fluent-emoji-flat. Names and answers count only where they match whole. Shots are drawings of the "
    "training vendors. Random: the same tower with random weights and a map of its own. Blind: CLIP's map on a white "
    "picture. Shuffled: on another drawing. Told in words: name and two keywords in the place of the soft prompts, "
    "what the language model can do at best. The text of the language model holds the names of all concepts, of those "
    "whose drawings are held out too. Tone asks whether the emoji comes in skin tones, half of the questions yes; "
    "colour is read from the pixels."
)
LACKS = (
    "Not in this run: the rows of a label-supervised, a self-supervised and a tuned encoder, and CLIPScore, which "
    "needs a second CLIP that is not the captioner's encoder."
)


def _cell(interval: dict | None) -> str:
    return "-" if interval is None else "{mean:.1f} ({low:.1f}, {high:.1f})".format(**interval)


def table(found: LimberResult) -> list[list[str]]:
    rows = []
    for name, figures in found.summaries.items():
        groups = figures["vqa"]["group"]
        cells = [figures["cider_d"], figures["name_seen"], figures["name_unseen"], *(groups.get(str(n)) for n in SHOTS)]
        rows.append([name, *map(_cell, cells)])
    return rows


def kinds(found: LimberResult) -> list[list[str]]:
    """Means of every kind of question by shots."""
    return [
        [name, *(" / ".join(f"{x['mean']:.0f}" for x in by_shots.values()) for by_shots in figures["vqa"].values())]
        for name, figures in found.summaries.items()
    ]


def section(found: LimberResult, benchmark: Benchmark, seed: int = 0, examples: int = 24) -> str:
    clip = found.rows[0]
    chosen = random.Random(seed).sample(range(len(clip.captions)), min(examples, len(clip.captions)))
    cards = []
    for row in chosen:
        concept = benchmark.drawn[row]
        right = clip.exact[row] > 0
        lines = [("✓ A picture of" if right else "A picture of", clip.captions[row])]
        for asked in benchmark.asked:
            if row in asked.rows:
                at = asked.rows.index(row)
                said = clip.answers[asked.kind][0][at]
                mark = "✓ " if clip.vqa[asked.kind][0][at] else ""
                lines.append((f"{mark}{asked.kind}:", said if mark else f"{said} (right: {asked.answers[at]})"))
        image = page.data_uri(png(benchmark.test.images[row]), "image/png")
        cards.append(page.photo(image, concept.name, lines))
    verdicts = [[what, figures, "yes" if held else "no"] for what, figures, held in bars(found)]
    return page.section(
        "limber",
        "LiMBeR: what a language model says of the drawings",
        page.table(HEADER, table(found)),
        page.paragraph(f"CIDEr-D of each concept's first name, the ceiling here: {found.ceiling:.0f}. {NOTE}", "note"),
        page.table(KINDS_HEADER, kinds(found)),
        page.table(("expected", "found", "held"), verdicts),
        page.paragraph(LACKS, "note"),
        page.paragraph("Random drawings with CLIP's captions and answers without shots; a tick marks what is right."),
        page.grid(cards),
    )
