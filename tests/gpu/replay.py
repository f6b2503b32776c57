"""Launches executed once, and again with the text of one kernel changed: no more of them than the change can reach.

    with recorded("sm_90") as steps:
        sound = op(x)
    with replayed(steps, text, changed, "sm_90") as replay:
        found = op(x)                  # the same bits as `sound` unless replay.differs
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpu.launching import launches_to
from gpu.ptx.launch import run_case
from limber_fast.kernels.catalogue import Case
from limber_fast.kernels.recording import Launch
from limber_fast.report.aot import compile_case


@dataclass(frozen=True)
class Step:
    """A launch: its kernel's name and compiled text, and what it left in those of its tensors that it changed."""

    kernel: str
    text: str
    after: dict[str, Tensor]


@contextmanager
def recorded(target: str, **options: Any) -> Iterator[list[Step]]:
    """Every launch inside the block is executed for `target` and written down."""
    steps: list[Step] = []

    def run(launch: Launch, case: Case) -> None:
        before = {name: x.clone() for name, x in _tensors(launch).items()}
        run_case(case, target, launch.grid, launch.arguments, **options)
        after = {name: x.clone() for name, x in _tensors(launch).items() if not _same(x, before[name])}
        steps.append(Step(case.kernel.__name__, compile_case(case, target).ptx, after))

    with launches_to(run):
        yield steps


@dataclass
class Replay:
    """Whether a changed launch has left other bits than the sound one."""

    differs: bool = False


@contextmanager
def replayed(steps: list[Step], text: str, changed: str, target: str, **options: Any) -> Iterator[Replay]:
    """The launches of `steps` once more, with `changed` in the place of `text`; options go to its executions alone.

    Until one of them leaves other bits than before, all other launches are filled in from the record.
    """
    replay, left = Replay(), iter(steps)

    def run(launch: Launch, case: Case) -> None:
        step, tensors = next(left), _tensors(launch)
        if step.text == text:
            run_case(case, target, launch.grid, launch.arguments, ptx=changed, **options)
            replay.differs |= not all(_same(tensors[name], x) for name, x in step.after.items())
        elif replay.differs:
            run_case(case, target, launch.grid, launch.arguments)
        else:
            for name, x in step.after.items():
                tensors[name].copy_(x)

    with launches_to(run):
        yield replay


def _tensors(launch: Launch) -> dict[str, Tensor]:
    return {name: x for name, x in launch.arguments.items() if isinstance(x, Tensor)}


def _same(x: Tensor, y: Tensor) -> bool:
    """Bit by bit: NaN equals itself, and zeros have signs."""
    return torch.equal(*(z.reshape(-1).view(torch.uint8) for z in (x, y)))
