"""Kernels' own launchers on CPU tensors: interpreted, or compiled for a chip and their PTX executed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
from triton.runtime.jit import JITFunction

from gpu.interpret import interpreted
from gpu.ptx.launch import run_case
from limber_fast import dispatch
from limber_fast.backends import triton as backend
from limber_fast.backends.triton import device
from limber_fast.kernels import catalogue
from limber_fast.kernels.recording import launch_of

# Every kernel file now: one imported first inside `interpreted()` would hold interpreted functions for good.
catalogue.cases("none")

CAPABILITY = {"interpreted": (9, 0), "sm_80": (8, 0), "sm_90": (9, 0)}
ENGINES = tuple(CAPABILITY)
PROGRAMS = 3  # fewer than tiles or rows: the persistent loops go round


def send_to_triton(monkeypatch: pytest.MonkeyPatch, op: str, engine: str, programs: int = PROGRAMS) -> None:
    """From here on `op` takes CPU tensors to the Triton backend, whose launches belong inside `running(engine)`."""
    monkeypatch.setitem(dispatch.ORDER, "cpu", ("triton", "eager"))
    monkeypatch.setattr(backend, f"{op}_supports", lambda request: None)
    monkeypatch.setattr(device, "chip", lambda where: (CAPABILITY[engine], programs))
    monkeypatch.setattr(device, "precision", lambda: "ieee")
    monkeypatch.setattr(device, "prepare", lambda tma: None)


def running(engine: str, **options: Any) -> AbstractContextManager[None]:
    """Inside the block every launch runs on `engine`; options go to the executor of PTX."""
    return interpreted() if engine == "interpreted" else executed(engine, **options)


@contextmanager
def executed(target: str, **options: Any) -> Iterator[None]:
    """Every Triton launch inside the block is compiled for `target` and its PTX executed."""

    def run(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        launch = launch_of(self, args, kwargs, grid)
        run_case(launch.case(self.__name__, False), target, launch.grid, launch.arguments, **options)

    original = JITFunction.run
    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = original
