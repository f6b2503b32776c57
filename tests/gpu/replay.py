"""Launches executed once, and again with the text of one kernel changed: no more of them than the change can reach.

    with recorded(of_triton("sm_90")) as steps:
        sound = op(x)
    with replayed(of_triton("sm_90"), steps, text, changed) as replay:
        found = op(x)                  # the same bits as `sound` unless replay.differs
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu import nvcc
from gpu.launching import launches_to
from gpu.ptx.launch import run_case
from limber_fast.kernels.catalogue import Case
from limber_fast.kernels.recording import Launch
from limber_fast.report.aot import compile_case


@dataclass(frozen=True)
class Launched:
    """A launch to be made: its kernel's name and compiled text, its tensors, and what executes it.

    execute: with `ptx` another text in the place of its own; other options are those of `gpu.ptx.execute`.
    """

    kernel: str
    text: str
    tensors: dict[str, Tensor]
    execute: Callable[..., Any]


Launches = Callable[[Callable[[Launched], None]], AbstractContextManager[Any]]
"""What hands every launch inside a block to a function, which stands for it."""


def of_triton(target: str) -> Launches:
    """Launches of Triton's kernels, compiled for `target`."""

    def launches(run: Callable[[Launched], None]) -> AbstractContextManager[None]:
        def one(launch: Launch, case: Case) -> None:
            tensors = {name: x for name, x in launch.arguments.items() if isinstance(x, Tensor)}
            execute = partial(run_case, case, target, launch.grid, launch.arguments)
            run(Launched(case.kernel.__name__, compile_case(case, target).ptx, tensors, execute))

        return launches_to(one)

    return launches


def of_nvcc(target: str) -> Launches:
    """Launches of the CUDA extension, compiled for `target`."""

    def launches(run: Callable[[Launched], None]) -> AbstractContextManager[None]:
        def one(launch: nvcc.Launch) -> None:
            tensors = {str(i): x for i, x in enumerate(launch.tensors)}
            execute = partial(nvcc.execute_launch, launch, target)
            name = re.search(r"\d([a-z_]+_kernel)", launch.kernel)[1]  # in the source, of all builds of a template
            run(Launched(name, nvcc.ptx_of_kernel(launch.stem, launch.kernel, target), tensors, execute))

        return nvcc.launches(one)

    return launches


@dataclass(frozen=True)
class Step:
    """A launch: its kernel's name and compiled text, and what it left in those of its tensors that it changed."""

    kernel: str
    text: str
    after: dict[str, Tensor]


@contextmanager
def recorded(launches: Launches, **options: Any) -> Iterator[list[Step]]:
    """Every launch inside the block is executed and written down."""
    steps: list[Step] = []

    def run(launch: Launched) -> None:
        before = {name: x.clone() for name, x in launch.tensors.items()}
        launch.execute(**options)
        after = {name: x.clone() for name, x in launch.tensors.items() if not _same(x, before[name])}
        steps.append(Step(launch.kernel, launch.text, after))

    with launches(run):
        yield steps


@dataclass
class Replay:
    """Whether a changed launch has left other bits than the sound one."""

    differs: bool = False


@contextmanager
def replayed(launches: Launches, steps: list[Step], text: str, changed: str, **options: Any) -> Iterator[Replay]:
    """The launches of `steps` once more, with `changed` in the place of `text`; options go to its executions alone.

    Until one of them leaves other bits than before, all other launches are filled in from the record.
    """
    replay, left = Replay(), iter(steps)

    def run(launch: Launched) -> None:
        step = next(left)
        if step.text == text:
            launch.execute(ptx=changed, **options)
            replay.differs |= not all(_same(launch.tensors[name], x) for name, x in step.after.items())
        elif replay.differs:
            launch.execute()
        else:
            for name, x in step.after.items():
                launch.tensors[name].copy_(x)

    with launches(run):
        yield replay


def _same(x: Tensor, y: Tensor) -> bool:
    """Bit by bit: NaN equals itself, and zeros have signs."""
    return torch.equal(*(z.reshape(-1).view(torch.uint8) for z in (x, y)))
