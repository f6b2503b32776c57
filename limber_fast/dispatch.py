"""Which backend runs an op: a fixed order per device, a named backend on request, and the reason for every refusal."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

OPS = ("info_nce", "project_concat", "int8_linear", "frozen_cross_entropy", "prefix_attention")
BACKENDS = ("cuda", "triton", "cpu", "eager")
CHOICES = ("auto", *BACKENDS)
ORDER = {"cuda": ("cuda", "triton", "eager"), "cpu": ("cpu", "eager")}
ENVIRONMENT_VARIABLE = "LIMBER_FAST_BACKEND"

_preference: ContextVar[str | None] = ContextVar("limber_fast_backend", default=None)


class BackendUnavailable(RuntimeError):
    """A backend that was asked for by name, or a native module it needs, cannot run here; the message says why."""


def _known(name: str, source: str) -> str:
    if name not in CHOICES:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, CHOICES))}; got {name!r}")
    return name


def use_backend(name: str) -> contextlib.AbstractContextManager[None]:
    """Run every op on backend `name` ('auto', 'cuda', 'triton', 'cpu' or 'eager') inside a `with` block or, as a
    decorator, inside a function.

    The choice belongs to the current thread and async task. An op's `backend=` argument outranks it; it outranks the
    environment variable LIMBER_FAST_BACKEND. A backward pass runs on the backend its forward pass ran on.

    Raises: ValueError for an unknown name; the ops raise BackendUnavailable where the backend cannot run.
    """
    return _using(_known(name, "use_backend: name"))


@contextlib.contextmanager
def _using(name: str) -> Iterator[None]:
    token = _preference.set(name)
    try:
        yield
    finally:
        _preference.reset(token)


def preferred(backend: str) -> str:
    """The name an op call asks for: its own argument, else use_backend, else LIMBER_FAST_BACKEND, else 'auto'.

    The op has checked its argument. Runs outside the opaque op, so that the backward pass inherits the answer whatever
    thread or context it runs in; torch.compile guards on the context variable and recompiles when it changes; the
    environment it reads once.
    """
    if backend != "auto":
        return backend
    if (chosen := _preference.get()) is not None:
        return chosen
    if chosen := os.environ.get(ENVIRONMENT_VARIABLE):
        return _known(chosen, ENVIRONMENT_VARIABLE)
    return "auto"


@cache
def _backend_module(name: str) -> ModuleType:
    return import_module(f"limber_fast.backends.{name}")


def _load(op: str, request: Any, backend: str) -> tuple[ModuleType | None, str]:
    """The backend's module if it can serve the request, else None and the reason."""
    if backend not in ORDER.get(request.device.type, ("eager",)):
        homes = " or ".join(device for device, order in ORDER.items() if backend in order)
        return None, f"runs on {homes} tensors; got {request.device.type}"
    try:
        module = _backend_module(backend)
        reason = getattr(module, f"{op}_supports")(request)
    except BackendUnavailable as unavailable:  # a native module that is missing, or an override it cannot satisfy
        return None, str(unavailable)
    return (module, "") if reason is None else (None, reason)


def select(op: str, request: Any, backend: str = "auto") -> ModuleType:
    """The module that will run `op`: the first in ORDER that supports the request, or exactly the named one.

    Raises: BackendUnavailable with every backend's reason; a named backend never falls back to another.
    """
    for name in ORDER.get(request.device.type, ("eager",)) if backend == "auto" else (backend,):
        module, _ = _load(op, request, name)
        if module is not None:
            return module
    lines = [f"  {name}: {_load(op, request, name)[1] or 'can run this'}" for name in BACKENDS]
    raise BackendUnavailable("\n".join([f"{op}: backend {backend!r} cannot run this call", *lines]))


def explain(op: str, device: str | torch.device) -> tuple[str, dict[str, str]]:
    """The backend that 'auto' (with the current overrides) picks for a typical call of `op`, and why others refuse."""
    request = import_module(f"limber_fast.ops.{op}").typical_request(torch.device(device))
    chosen = select(op, request, preferred("auto")).__name__.rpartition(".")[2]
    reasons = {name: _load(op, request, name)[1] for name in BACKENDS}
    return chosen, {name: reason for name, reason in reasons.items() if reason}
