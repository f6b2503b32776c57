"""Charts as SVG: plain axes, direct labels, one colour per implementation."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from limber_fast.evaluation.emoji_transfer import GroupAccuracy, Shift
from limber_fast.report.loss_timing import Point

INK, FUSED, EAGER, SOFT = "#1d1d1b", "#0b6e4f", "#b3541e", "#8a867b"
_COLOURS = {"limber_fast": FUSED, "eager": EAGER}
_LINES = {"bfloat16": "-", "float32": "--"}
_SHORT = {"bfloat16": "bf16", "float32": "fp32"}


def row_of_axes(columns: int, height: float = 3.4) -> tuple[Figure, list]:
    """A figure of the page's width with its axes side by side, in the page's style."""
    figure = Figure(figsize=(10, height), layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(1, columns)))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(SOFT)
        axis.tick_params(colors=INK, labelsize=9)
        axis.grid(axis="y", color="#e6e2d8", linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, axes


def to_svg(figure: Figure) -> bytes:
    """The figure on a transparent ground, without a date."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def training_curve(history: Sequence[dict[str, float]]) -> bytes:
    """Loss, in-batch accuracy and logit scale against minutes of training."""
    figure, (left, middle, right) = row_of_axes(3, 3.0)
    minutes = [row["seconds"] / 60 for row in history]
    left.plot(minutes, [row["image_text_loss"] for row in history], color=FUSED, label="image - text")
    styles = [row.get("image_image_loss", float("nan")) for row in history]  # none once the image tower is locked
    left.plot(minutes, styles, color=SOFT, label="style - style")
    left.legend(frameon=False, fontsize=9)
    middle.plot(minutes, [100 * row["accuracy"] for row in history], color=FUSED)
    right.plot(minutes, [row["scale"] for row in history], color=FUSED)
    titles = ("InfoNCE loss, nats", "right caption in the batch, %", "logit scale")
    for axis, title in zip((left, middle, right), titles, strict=True):
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel("minutes", fontsize=9)
        axis.set_ylim(0, 1.08 * max(axis.dataLim.y1, 1e-6))
    return to_svg(figure)


def confusion(groups: Sequence[str], counts: np.ndarray) -> bytes:
    """Share of each true group's images whose best name lies in each group, percent of the row."""
    share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure = Figure(figsize=(8.4, 5.6), layout="constrained")
    axis = figure.subplots()
    axis.imshow(share, cmap="Greens", vmin=0, vmax=100, aspect="auto")
    names = [group.replace("-", " ") for group in groups]
    axis.set_xticks(range(len(groups)), names, rotation=35, ha="right", fontsize=9)
    axis.set_yticks(range(len(groups)), [f"{n} ({c})" for n, c in zip(names, counts.sum(1), strict=True)], fontsize=9)
    axis.set_xlabel("group of the best name", fontsize=10)
    axis.set_ylabel("group of the image (count)", fontsize=10)
    axis.spines[:].set_visible(False)
    for (row, column), value in np.ndenumerate(share):
        if value >= 0.5:
            axis.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8,
                      color="white" if value > 55 else INK)  # fmt: skip
    return to_svg(figure)


def loss_cost(points: Sequence[Point]) -> bytes:
    """Time and extra peak memory of one forward and backward pass against the batch size, both axes logarithmic."""
    figure, axes = row_of_axes(2, 4.0)
    for axis, field, title in zip(
        axes, ("seconds", "peak_mib"), ("time, seconds", "peak memory beyond the inputs, MiB"), strict=True
    ):
        for dtype, line in _LINES.items():
            for implementation, colour in _COLOURS.items():
                chosen = [p for p in points if (p.dtype, p.implementation) == (dtype, implementation) and not p.skipped]
                # A size whose memory the process already had shows no rise: there is nothing to draw on a log axis.
                drawn = [(p.n, getattr(p, field)) for p in chosen if getattr(p, field) > 0]
                label = f"{implementation}, {_SHORT[dtype]}"
                if drawn:
                    axis.plot(*zip(*drawn, strict=True), line, color=colour, marker="o", ms=4, label=label)
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        sizes = sorted({p.n for p in points})
        axis.set_xticks(sizes, [str(n) for n in sizes])
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("pairs in the batch, N", fontsize=9)
    axes[0].legend(frameon=False, fontsize=9)
    return to_svg(figure)


def against_probe(seeds: Sequence[Sequence[GroupAccuracy]]) -> bytes:
    """Zero-shot minus probe in points, a bar a group: the mean over seeds, largest first; dots are the seeds."""
    figure, (axis,) = row_of_axes(1, 3.6)
    points = np.array([[x.zero_shot - x.probe for x in found] for found in seeds])
    order = points.mean(0).argsort()
    labels = [f"{seeds[0][i].group} ({seeds[0][i].names} names)" for i in order]
    means = points.mean(0)[order]
    axis.barh(labels, means, color=[FUSED if value > 0 else EAGER for value in means], alpha=0.75)
    for found in points:
        axis.plot(found[order], range(len(order)), "o", color=INK, ms=3)
    axis.axvline(0, color=SOFT, linewidth=0.8)
    axis.set_title("zero-shot CLIP minus linear probe, points", loc="left", fontsize=10)
    return to_svg(figure)


def robustness(seeds: Sequence[Sequence[Shift]]) -> bytes:
    """Accuracy on the unseen vendor against that on the training vendors, a point a model and seed."""
    figure, (axis,) = row_of_axes(1, 4.0)
    for at, colour in enumerate((FUSED, EAGER)):
        drawn = [(found[at].known_vendors, found[at].unseen_vendor) for found in seeds]
        axis.plot(*zip(*drawn, strict=True), "o", color=colour, ms=7, label=seeds[0][at].model)
    values = [x for found in seeds for shift in found for x in (shift.known_vendors, shift.unseen_vendor)]
    ends = [max(0, min(values) - 5), min(100, max(values) + 5)]
    axis.plot(ends, ends, ":", color=SOFT)
    axis.set_xlabel("training vendors' drawings, %", fontsize=9)
    axis.set_title("unseen vendor's drawings, %", loc="left", fontsize=10)
    axis.legend(frameon=False, fontsize=9)
    return to_svg(figure)
