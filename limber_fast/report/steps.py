"""Whole passes in `limber-fast bench --modelled`: the floors of all their launches, added up by kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from limber_fast.console import Console
from limber_fast.kernels import catalogue
from limber_fast.kernels.catalogue import Case, Work
from limber_fast.report.aot import compile_case
from limber_fast.report.aot.chips import CHIPS
from limber_fast.report.bounds import TENSOR_SPEED, bound


def select(target: str, part: str | None) -> dict[str, list[tuple[Case, Work]]]:
    """What has `part` in its name; nothing for an AMD target, which gets no bounds."""
    found = catalogue.steps(target) if target in CHIPS else {}
    return {name: launches for name, launches in found.items() if part is None or part in name}


def price(name: str, launches: Sequence[tuple[Case, Work]], target: str) -> dict[str, Any]:
    """Floors of a whole pass by kernel, launch after launch.

    `overlapped` and `serial` are shares of the floor that its products alone have on busy tensor cores: with everything
    else hidden under them as far as the bounds allow, and with nothing hidden.
    """
    chip, kernels = CHIPS[target], {}
    for case, work in launches:
        found = bound(compile_case(case, target), work, chip)
        one = kernels.setdefault(case.name, dict.fromkeys(("launches", "floor_s", "serial_s", "products_s"), 0))
        one["launches"] += 1
        one["floor_s"] += found.floor
        one["serial_s"] += found.floor + found.around
        one["products_s"] += work.flops / (chip.tensor.value * TENSOR_SPEED.get(work.dtype, 1.0))
    total = {key: sum(one[key] for one in kernels.values()) for key in next(iter(kernels.values()))}
    rows = [{"kernel": kernel, **one} for kernel, one in (*kernels.items(), ("all", total))]
    for one in rows:
        one |= {"overlapped": one["products_s"] / one["floor_s"], "serial": one["products_s"] / one["serial_s"]}
    return {"step": name, "rows": rows}


def show(console: Console, one: Mapping[str, Any], label: str) -> None:
    header = ["kernel", "launches", "floor us", "products us", "products' share", "with nothing hidden"]
    cells = [
        [row["kernel"], str(row["launches"]), f"{row['floor_s'] * 1e6:.1f}", f"{row['products_s'] * 1e6:.1f}",
         f"{row['overlapped']:.0%}", f"{row['serial']:.0%}"]
        for row in one["rows"]
    ]  # fmt: skip
    console.table(f"{one['step']}: {label}", header, cells)
