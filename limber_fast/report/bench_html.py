"""The table and the page of `limber-fast bench`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from limber_fast.report import page
from limber_fast.report.charts import EAGER, FUSED, INK, SOFT, row_of_axes, to_svg

Row = dict[str, Any]

HEADER = (
    "row", "eager / ours", "of the best", "other ratios", "warm", "cold", "eager warm", "memory", "eager memory",
    "GFLOP/s", "of ceiling", "note",
)  # fmt: skip
# What fits beside each other on a terminal; the page and bench.json have the rest.
_BRIEF = ("row", "eager / ours", "other ratios", "warm", "eager warm", "memory", "of ceiling", "note")
_LINES = {"float32": "--", "bfloat16": "-", "float16": ":"}
_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_COLOURS = {"eager": FUSED, "eager_fp32": SOFT}
_READING = (
    "Forward and backward. eager / ours: the median over pairs of the ratio of times, a baseline and ours by turns in "
    "one process; above 1 ours is faster. Every result was checked against sums in float64 before it was timed. Cold: "
    "the first call at this shape. Memory: the rise of the peak during that call, gradients included. Of ceiling: "
    "executed floating-point operations against the register-only peak of the same instruction set with all threads "
    "busy, the higher of two measured right before and right after the row."
)


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """One line per row under HEADER; a losing, skipped or failed row says so in its note."""
    return [
        [row["id"], _ratio(row.get("eager_ratio")), _ratio(row.get("eager_ratio_of_best")), _others(row),
         _time(row.get("warm_s")), _time(row.get("cold_s")), _time(row.get("eager_warm_s")),
         _memory(row.get("peak_bytes")), _memory(row.get("eager_peak_bytes")), _scaled(row.get("flop_per_s"), 1e9),
         f"{row['ceiling_fraction']:.0%}" if "ceiling_fraction" in row else "-", _note(row)]
        for row in rows
    ]  # fmt: skip


def brief(rows: Sequence[Row]) -> tuple[Sequence[str], list[list[str]]]:
    """Header and lines of the table for a terminal."""
    kept = [HEADER.index(name) for name in _BRIEF]
    return _BRIEF, [[line[column] for column in kept] for line in cells(rows)]


def render(result: dict[str, Any]) -> str:
    """The whole page of one bench.json."""
    rows = result["rows"]
    return page.page(
        "limber_fast benchmarks",
        "<h1>limber_fast against eager PyTorch</h1>",
        page.paragraph(_lead(result), "lead"),
        page.section("charts", "Over batch size and width", *_charts(rows)),
        page.section(
            "rows",
            "All rows",
            f'<div style="overflow-x: auto">{page.table(HEADER, cells(rows))}</div>',
            page.paragraph(_READING, "note"),
        ),
        page.section("ceilings", "Ceilings of this machine, at the start of this run", _ceilings(result["ceilings"])),
        page.section("machine", "This machine", page.table(("", ""), _machine(result))),
    )


def _lead(result: dict[str, Any]) -> str:
    compared = [row for row in result["rows"] if row.get("eager_ratio") is not None]
    lost = sum(row["eager_ratio"] < 1 for row in compared)
    skipped = sum(row["status"] == "skipped" for row in result["rows"])
    failed = sum(row["status"] == "failed" for row in result["rows"])
    return (
        f"{len(result['rows'])} rows on {result['machine']['cpu']['model']}, threads: {result['threads']}. "
        f"{len(compared)} were timed against eager: {len(compared) - lost} faster, {lost} slower; "
        f"{skipped} skipped, {failed} failed."
    )


def _charts(rows: Sequence[Row]) -> list[str]:
    size = [row for row in rows if row.get("group") == "size" and row["status"] == "ok"]
    width = [row for row in rows if row.get("group") == "width" and row["status"] == "ok"]
    drawn = []
    if size:
        figure, (left, right) = row_of_axes(2, 4.0)
        for name in dict.fromkeys(name for row in size for name in _by_baseline(row, "ratio")):
            _lines(left, size, "N", f"{name}_ratio", name, _COLOURS.get(name, EAGER))
        left.axhline(1, color=INK, linewidth=0.8)
        _lines(right, size, "N", "ceiling_fraction", "cache of 256 MiB", FUSED, 100)
        off = [row for row in rows if row.get("group") == "cache_off"]
        _lines(right, off, "N", "ceiling_fraction", "cache off", EAGER, 100)
        _finish(left, "time of a baseline / ours (above 1: ours is faster)", "pairs in the batch, N")
        _finish(right, "share of the arithmetic peak, %", "pairs in the batch, N")
        drawn.append(page.chart(to_svg(figure), "Ratio of times, and share of the arithmetic peak, against N"))
    memory = [row for row in size if row.get("peak_bytes")]
    if memory or width:
        figure, (left, right) = row_of_axes(2, 4.0)
        _lines(left, memory, "N", "peak_bytes", "limber_fast", FUSED, 2**-20)
        _lines(left, memory, "N", "eager_peak_bytes", "eager", EAGER, 2**-20)
        for n, colour in zip(sorted({row["shape"]["N"] for row in width}), (SOFT, FUSED, EAGER, INK), strict=False):
            _lines(right, [row for row in width if row["shape"]["N"] == n], "D", "eager_ratio", f"N = {n}", colour)
        right.axhline(1, color=INK, linewidth=0.8)
        if memory:
            left.set_yscale("log")
        _finish(left, "peak memory beyond the inputs, MiB", "pairs in the batch, N", from_zero=False)
        _finish(right, "time of eager / ours", "features, D")
        drawn.append(page.chart(to_svg(figure), "Peak memory against N, and the ratio to eager against D"))
    if asked := [row for row in rows if row.get("op") == "few_shot" and row["status"] == "ok"]:
        drawn.append(_few_shot_chart(asked))
    return drawn or [page.paragraph("No row of a sweep was measured in this run.")]


def _few_shot_chart(rows: Sequence[Row]) -> str:
    """Seconds per question over the number of questions after the same shots."""
    figure, axes = row_of_axes(2, 4.0)
    names = {"": ("shots computed once", FUSED), "without_reuse_": ("every prompt whole", SOFT),
             "eager_prefix_": ("transformers, copied cache", INK), "eager_": ("transformers", EAGER)}  # fmt: skip
    for axis, mode in zip(axes, ("w8a8", "w8a16"), strict=True):
        kind = [row for row in rows if row["shape"]["shots"] == 4 and ("w8a8" in row) == (mode == "w8a8")]
        for baseline, (label, colour) in names.items():
            key = f"{baseline}warm_s"
            points = [{**row, key: row[key] / row["shape"]["Q"]} for row in kind if row.get(key)]
            _lines(axis, points, "Q", key, label, colour)
        _finish(axis, f"seconds per question, 4 shots, {mode}", "questions, Q")
    return page.chart(to_svg(figure), "Seconds per question, with the shots computed once and without")


def _lines(axis, rows: Sequence[Row], letter: str, key: str, label: str, colour: str, factor: float = 1) -> None:
    for dtype, line in _LINES.items():
        points = sorted(
            (row["shape"][letter], factor * row[key]) for row in rows if row["dtype"] == dtype and row.get(key)
        )
        if points:
            axis.plot(
                *zip(*points, strict=True), line, color=colour, marker="o", ms=4, label=f"{label}, {_SHORT[dtype]}"
            )


def _finish(axis, title: str, label: str, from_zero: bool = True) -> None:
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_xlabel(label, fontsize=9)
    handles, labels = axis.get_legend_handles_labels()
    if not handles:
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color=SOFT)
        return
    ticks = sorted({x for line in handles for x in line.get_xdata()})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{x // 1024}k" if x >= 1024 and x % 1024 == 0 else str(x) for x in map(int, ticks)])
    axis.minorticks_off()
    if from_zero:
        axis.set_ylim(bottom=0)
    axis.legend(handles, labels, frameon=False, fontsize=8)


def _ceilings(found: dict[str, Any]) -> str:
    if not found:
        return page.paragraph("Not measured: no row ran.")
    rows = [(f"{isa} {kind}, registers only", f"{_scaled(value, 1e9)} GFLOP/s")
            for isa, peaks in found["peak_flop_per_s"].items() for kind, value in peaks.items() if value]  # fmt: skip
    rows += [(f"torch GEMM {kind}", f"{_scaled(value, 1e9)} GFLOP/s")
             for kind, value in found["torch_gemm_flop_per_s"].items()]  # fmt: skip
    rows.append(("reading memory", f"{_scaled(found['read_bytes_per_s'], 1e9)} GB/s"))
    return page.table((f"all {found['threads']} threads together", ""), rows)


def _machine(result: dict[str, Any]) -> list[tuple[str, str]]:
    machine = result["machine"]
    versions = [(name, version) for name, version in machine["versions"].items() if version]
    return [("measured", result["created"]), ("CPU", machine["cpu"]["model"]),
            ("kernels", machine["cpu"]["isa"] or machine["cpu"]["error"]), ("platform", machine["platform"]),
            *versions, *machine["environment"].items()]  # fmt: skip


def _note(row: Row) -> str:
    if row["status"] != "ok":
        return f"{row['status']}: {row['reason']}"
    slower = [f"slower than {name}" for name, ratio in _by_baseline(row, "ratio").items() if ratio < 1]
    return "; ".join(slower + [f"{name} skipped: {why}" for name, why in _by_baseline(row, "skipped").items()])


def _others(row: Row) -> str:
    ratios = _by_baseline(row, "ratio")
    return ", ".join(f"{name} {_ratio(ratio)}" for name, ratio in ratios.items() if name != "eager") or "-"


def _by_baseline(row: Row, column: str) -> Row:
    """{baseline: value} of the columns `<baseline>_<column>`."""
    return {key.removesuffix(f"_{column}"): value for key, value in row.items() if key.endswith(f"_{column}")}


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.2f} ms"


def _memory(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.1f} MiB"


def _scaled(value: float | None, unit: float) -> str:
    return "-" if value is None else f"{value / unit:.1f}"
