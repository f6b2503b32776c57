"""Every engine (backend and, on the CPU, instruction set) as a fixture, and outputs that start as NaN."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from limber_fast import native

# Eager's products are equal bit by bit, whatever their operands' strides and addresses, only where MKL is asked for it
# (before its first call): on CPUs of AMD they are not.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

# `python -m pytest` puts the repository root on sys.path, where transformers takes kernels/ for a package it knows.
_TESTS = Path(__file__).resolve().parent
sys.path[:] = [str(_TESTS), *(path for path in sys.path if Path(path or ".").resolve() != _TESTS.parent)]

from poisoning import poison  # noqa: E402

OWN_KERNELS = [f"cpu-{isa}" for isa in native.available_isas()]
ENGINES = ["eager", *OWN_KERNELS]


def _select(engine: str, monkeypatch: pytest.MonkeyPatch) -> str:
    backend, _, isa = engine.partition("-")
    if isa:
        monkeypatch.setenv(native.ISA_VARIABLE, isa)
    return backend


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The `backend=` of every engine that runs here; the instruction set is set in the environment."""
    return _select(request.param, monkeypatch)


@pytest.fixture(params=OWN_KERNELS or [pytest.param("", marks=pytest.mark.skip(reason="no native module was built"))])
def own_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The engines whose arithmetic is this project's own, with its promises about threads and forks."""
    return _select(request.param, monkeypatch)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised tensors hold NaN (bytes: 255), so that an element nobody writes, or reads too early, shows."""
    poison(monkeypatch)


@pytest.fixture
def threads():
    """torch.set_num_threads for the length of a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def same_in_a_forked_child() -> Callable[[Callable[[], object]], None]:
    """Asserts that run() gives one result in this process, in a child forked from it, and here once more."""

    def check(run: Callable[[], object]) -> None:
        expected = run()  # the parent's thread pool is up
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # a child that waits for the parent's threads would wait for ever
            os._exit(0 if run() == expected else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert run() == expected

    return check
