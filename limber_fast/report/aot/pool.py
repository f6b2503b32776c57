"""Compiles and gates a catalogue's cases in several processes; Triton's cache on disk holds them for this one then."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from typing import TypeVar

from limber_fast.kernels import catalogue
from limber_fast.kernels.catalogue import Case, Work
from limber_fast.report.aot.build import compile_case
from limber_fast.report.aot.rules import gate

_Job = tuple[str, str, str, int]  # target, the catalogue's target, file, position
_Result = TypeVar("_Result")
CASES_PER_PROCESS = 12  # a process imports torch before its first case: fewer are compiled sooner without


def compile_ahead(target: str, chosen: Sequence[tuple[str, int]], catalogue_target: str | None = None) -> Iterator[str]:
    """Names of the cases as they are done; none where the cases are too few for a second process.

    Args:
        chosen: file and position of each case in the catalogue: a kernel itself does not travel between processes.
        catalogue_target: whose cases, where not those of `target`.
    """
    jobs = [(target, catalogue_target or target, *place) for place in chosen]
    if _processes(jobs) > 1:
        yield from _in_processes(_compile, jobs)


def gate_all(target: str, chosen: Sequence[tuple[str, int]]) -> list[str]:
    """What `gate` has against these cases; arguments as above. Disassembly takes as long as compilation."""
    jobs = [(target, target, *place) for place in chosen]
    found = _in_processes(_gate, jobs) if _processes(jobs) > 1 else map(_gate, jobs)
    return [failure for failures in found for failure in failures]


def _processes(jobs: Sequence[_Job]) -> int:
    return min(os.cpu_count() or 1, len(jobs) // CASES_PER_PROCESS)


def _in_processes(work: Callable[[_Job], _Result], jobs: Sequence[_Job]) -> Iterator[_Result]:
    # Not by fork: this process may have threads of OpenMP, which a forked one waits for in vain.
    with ProcessPoolExecutor(_processes(jobs), mp_context=get_context("spawn")) as pool:
        yield from pool.map(work, jobs)


@lru_cache(maxsize=1)
def _listed(target: str) -> dict[str, list[tuple[Case, Work]]]:
    return catalogue.cases(target)


def _case(job: _Job) -> tuple[Case, str]:
    target, catalogue_target, stem, position = job
    return _listed(catalogue_target)[stem][position][0], target


def _compile(job: _Job) -> str:
    case, target = _case(job)
    compile_case(case, target)
    return case.name


def _gate(job: _Job) -> list[str]:
    return gate(*_case(job))
