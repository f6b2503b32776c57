"""Compiles a catalogue's cases in several processes, so that Triton's cache on disk holds them for this one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context

from limber_fast.kernels import catalogue
from limber_fast.kernels.catalogue import Case, Work
from limber_fast.report.aot.build import compile_case

CASES_PER_PROCESS = 12  # a process imports torch before its first case: fewer are compiled sooner without


def compile_ahead(target: str, chosen: Sequence[tuple[str, int]], catalogue_target: str | None = None) -> Iterator[str]:
    """Names of the cases as they are done; none where the cases are too few for a second process.

    Args:
        chosen: file and position of each case in the catalogue: a kernel itself does not travel between processes.
        catalogue_target: whose cases, where not those of `target`.
    """
    processes = min(os.cpu_count() or 1, len(chosen) // CASES_PER_PROCESS)
    if processes < 2:
        return
    jobs = [(target, catalogue_target or target, *place) for place in chosen]
    # Not by fork: this process may have threads of OpenMP, which a forked one waits for in vain.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_compile, jobs)


@lru_cache(maxsize=1)
def _listed(target: str) -> dict[str, list[tuple[Case, Work]]]:
    return catalogue.cases(target)


def _compile(job: tuple[str, str, str, int]) -> str:
    target, catalogue_target, stem, position = job
    case, _ = _listed(catalogue_target)[stem][position]
    compile_case(case, target)
    return case.name
