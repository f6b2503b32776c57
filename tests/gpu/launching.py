"""Kernels' own launchers on CPU tensors: interpreted, or compiled for a chip and their PTX executed; and on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map_only
from triton.runtime.jit import JITFunction

from gpu.interpret import interpreted
from gpu.ptx.launch import run_case
from limber_fast import dispatch
from limber_fast.backends import triton as backend
from limber_fast.backends.triton import device
from limber_fast.kernels import catalogue
from limber_fast.kernels.catalogue import Case
from limber_fast.kernels.recording import Launch, launch_of

# Every kernel file now: one imported first inside `interpreted()` would hold interpreted functions for good.
catalogue.cases("none")

CAPABILITY = {"interpreted": (9, 0), "sm_80": (8, 0), "sm_90": (9, 0)}
ON_DEVICE = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
ENGINES = (*CAPABILITY, pytest.param("cuda", marks=ON_DEVICE))
PROGRAMS = 3  # fewer than tiles or rows: the persistent loops go round


def send_to_triton(monkeypatch: pytest.MonkeyPatch, op: str, engine: str, programs: int = PROGRAMS) -> None:
    """From here on `op` takes CPU tensors to the Triton backend, whose launches belong inside `running(engine)`.

    Engine "cuda": the kernels on the device; the op goes through `on(engine, op)`.
    """
    capability = CAPABILITY.get(engine) or torch.cuda.get_device_capability()
    monkeypatch.setattr(device, "chip", lambda where: (capability, programs))
    if engine == "cuda":
        monkeypatch.setitem(dispatch.ORDER, "cuda", ("triton",))
        return
    monkeypatch.setitem(dispatch.ORDER, "cpu", ("triton", "eager"))
    monkeypatch.setattr(backend, f"{op}_supports", lambda request: None)
    monkeypatch.setattr(device, "precision", lambda: "ieee")
    monkeypatch.setattr(device, "prepare", lambda tma: None)


def on_engines(name: str, values: Iterable[Any], kept: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrises `engine` and `name`. Executing PTX takes long: by default of what is `kept`, else as slow_gpu."""

    def marks(engine: str, value: Any) -> Any:
        if engine == "cuda":
            return ON_DEVICE
        return () if engine == "interpreted" or value in kept else pytest.mark.slow_gpu

    cases = [
        pytest.param(engine, value, marks=marks(engine, value)) for engine in (*CAPABILITY, "cuda") for value in values
    ]
    return pytest.mark.parametrize(("engine", name), cases, indirect=["engine"])


def on(engine: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, its tensors sent to the engine's device and its results back to the CPU, as their gradients are."""
    if engine != "cuda":
        return function

    @wraps(function)
    def there(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map_only(torch.Tensor, lambda x: x.cuda(), (args, kwargs))
        return tree_map_only(torch.Tensor, lambda x: x.cpu(), function(*args, **kwargs))

    return there


def running(engine: str, **options: Any) -> AbstractContextManager[None]:
    """Inside the block every launch runs on `engine`; options go to the executor of PTX."""
    if engine == "cuda":
        return nullcontext()
    return interpreted(traps=True) if engine == "interpreted" else executed(engine, **options)


def executed(target: str, **options: Any) -> AbstractContextManager[None]:
    """Every Triton launch inside the block is compiled for `target` and its PTX executed."""
    return launches_to(lambda launch, case: run_case(case, target, launch.grid, launch.arguments, **options))


@contextmanager
def launches_to(run: Callable[[Launch, Case], Any]) -> Iterator[None]:
    """Inside the block `run` stands for every Triton launch."""

    def launched(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        launch = launch_of(self, args, kwargs, grid)
        run(launch, launch.case(self.__name__, False))

    original = JITFunction.run
    JITFunction.run = launched
    try:
        yield
    finally:
        JITFunction.run = original
