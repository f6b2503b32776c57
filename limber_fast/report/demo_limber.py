"""The demo page's section on LiMBeR: the paper's table in miniature, its bars, captions right and wrong, and with every
row the CLIP paper's two figures."""

from __future__ import annotations

import random

from limber_fast.demo_limber import CLIP, LABELS, RANDOM, bars, merged, missed_orders
from limber_fast.evaluation.emoji_limber import SHOTS, Benchmark, Row
from limber_fast.miniature import Miniature
from limber_fast.report import charts, page
from limber_fast.report.images import png

HEADER = ("", "CIDEr-D", "CLIPScore", "RefCLIPScore", "names, seen", "names, unseen",
          *(f"group, {n} shots" for n in SHOTS))  # fmt: skip
KINDS_HEADER = ("0 / 1 / 2 / 4 shots", "group", "subgroup", "colour", "gender", "tone")
NOTE = (
    "Percent; CIDEr-D and CLIPScores times 100. A frozen GPT-J of 2.9 M parameters, trained on text alone, is given "
    "four soft prompts of a drawing, each a linear map of the image tower's 2 x 2 features; the maps are fitted on "
    "naming the training vendors' drawings, and on nothing else. All rows are of fluent-emoji-flat. Names and answers "
    "count only where they match whole. Shots are drawings of the training vendors. Random: the same tower with random "
    "weights and a map of its own. Blind: CLIP's map on a white picture. Shuffled: on another drawing. Told in words: "
    "name and two keywords in the place of the soft prompts, what the language model can do at best. The text of the "
    "language model holds the names of all concepts, of those whose drawings are held out too; in three of five of its "
    "lines, but those on colour, weighted sums of names' token embeddings stood in the place of the words, made to be "
    "like soft prompts. Tone asks whether the emoji comes in skin tones, half of the questions yes; colour is read "
    "from the pixels."
)
FULL_NOTE = (
    "Label-supervised: the same tower trained on the concepts' subgroups, without captions (as NFRN50 on ImageNet's "
    "classes); tuned: trained on with the map. Self-supervised: half of a drawing from the other half (as BEIT). All "
    "have one architecture, so one random row serves for all. CLIPScore is by the CLIP of another seed."
)
LACKS = (
    "Not in this run: the rows of a label-supervised, a self-supervised and a tuned encoder, and CLIPScore, which "
    "needs a second CLIP that is not the captioner's encoder: `limber-fast demo --full` has them."
)
RESUMED = "The same command with `--resume` adds them."
PROBE_NOTE = (
    "Names of seen concepts within their group, on the unseen vendor's drawings: CLIP is told the names in words, the "
    "probe is logistic regression on the label-supervised tower's features, fitted on the training vendors' drawings."
)
SHIFT_NOTE = (
    "Subgroups of concepts that no tower was trained on: accuracy on the training vendors' drawings of them against "
    "the unseen vendor's. CLIP's classes are the mean of the names of a subgroup's other concepts. Vendors' styles are "
    "the shift; on the dotted line it costs nothing."
)


def _cell(interval: dict | None) -> str:
    return "-" if interval is None else "{mean:.1f} ({low:.1f}, {high:.1f})".format(**interval)


def table(found: Miniature) -> list[list[str]]:
    rows = []
    for name, figures in merged(found.limber).items():
        groups = figures["vqa"]["group"]
        columns = ("cider_d", "clip_score", "ref_clip_score", "name_seen", "name_unseen")
        cells = [*(figures[x] for x in columns), *(groups.get(str(n)) for n in SHOTS)]
        rows.append([name, *map(_cell, cells)])
    return rows


def kinds(found: Miniature) -> list[list[str]]:
    """Means of every kind of question by shots."""
    return [
        [name, *(" / ".join(f"{x['mean']:.0f}" for x in by_shots.values()) for by_shots in figures["vqa"].values())]
        for name, figures in merged(found.limber).items()
    ]


def _intervals(found: Miniature) -> str:
    if (seeds := len(found.limber)) == 1:
        return "In brackets 95% intervals over resampled drawings of this one run."
    return f"Means of {seeds} seeds, in brackets the lowest and the highest."


def order(found: Miniature) -> str:
    """Whether CIDEr-D falls as in the paper, and where it does not."""
    summaries = merged(found.limber)
    if not {LABELS, RANDOM} & {*summaries}:
        return "No other encoder's CIDEr-D is here to compare CLIP's with."
    missed = missed_orders(summaries)
    if missed:
        return f"The paper's order did not appear: {' '.join(missed)}"
    rest = "" if found.groups else ", of the rows that this run has"
    return f"CIDEr-D falls in the paper's order: CLIP, label-supervised, self-supervised, random{rest}."


def held(found: Miniature) -> str:
    """How many of the bars hold, and which do not."""
    verdicts = bars(merged(found.limber))
    missed = [what for what, _, ok in verdicts if not ok]
    if not missed:
        return f"All {len(verdicts)} expectations hold."
    return f"{len(verdicts) - len(missed)} of {len(verdicts)} expectations hold. Not held: {'; '.join(missed)}."


def markdown(found: Miniature) -> str:
    """The tables as Markdown, for a note or a README."""

    def lines(header: tuple[str, ...], rows: list[list[str]]) -> list[str]:
        return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]

    ceiling = f"CIDEr-D's ceiling: {found.limber[0].ceiling:.0f}. {_intervals(found)} {order(found)} {held(found)}"
    return "\n".join([*lines(HEADER, table(found)), "", ceiling, "", *lines(KINDS_HEADER, kinds(found)), ""])


def section(found: Miniature, benchmark: Benchmark, seed: int = 0, examples: int = 24) -> str:
    summaries, lacks = merged(found.limber), found.limber[0].left_out
    verdicts = [[what, figures, "yes" if ok else "no"] for what, figures, ok in bars(summaries)]
    ceiling = f"CIDEr-D of each concept's first name, the ceiling here: {found.limber[0].ceiling:.0f}."
    return page.section(
        "limber",
        "LiMBeR: what a language model says of the drawings",
        page.table(HEADER, table(found)),
        page.paragraph(f"{ceiling} {_intervals(found)} {NOTE} {FULL_NOTE if LABELS in summaries else ''}", "note"),
        *([page.paragraph(f"Left out, as time was short: {', '.join(lacks)}. {RESUMED}")] if lacks else []),
        page.paragraph(order(found)),
        page.table(KINDS_HEADER, kinds(found)),
        page.paragraph(held(found)),
        page.table(("expected", "found", "held"), verdicts),
        *(_figures(found) if found.groups else [page.paragraph(LACKS, "note")]),
        page.paragraph("Random drawings with CLIP's captions and answers without shots; a tick marks what is right."),
        page.grid(_cards(found.limber[0].rows[CLIP], benchmark, seed, examples)),
    )


def _figures(found: Miniature) -> list[str]:
    probe, shift = charts.against_probe(found.groups), charts.robustness(found.shifts)
    return [
        page.chart(probe, "Zero-shot CLIP minus a linear probe on the label-supervised tower, by group of concepts"),
        page.paragraph(PROBE_NOTE, "note"),
        page.chart(shift, "Accuracy on the unseen vendor's drawings against accuracy on the training vendors'"),
        page.paragraph(SHIFT_NOTE, "note"),
    ]


def _cards(clip: Row, benchmark: Benchmark, seed: int, examples: int) -> list[str]:
    chosen = random.Random(seed).sample(range(len(clip.captions)), min(examples, len(clip.captions)))
    cards = []
    for row in chosen:
        lines = [("✓ A picture of" if clip.exact[row] > 0 else "A picture of", clip.captions[row])]
        for asked in benchmark.asked:
            if row in asked.rows:
                at = asked.rows.index(row)
                said = clip.answers[asked.kind][0][at]
                mark = "✓ " if clip.vqa[asked.kind][0][at] else ""
                lines.append((f"{mark}{asked.kind}:", said if mark else f"{said} (right: {asked.answers[at]})"))
        image = page.data_uri(png(benchmark.test.images[row]), "image/png")
        cards.append(page.photo(image, benchmark.drawn[row].name, lines))
    return cards
