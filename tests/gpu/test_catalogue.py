"""Every build that a launcher can ask for passes the gate on every chip: shared memory, spills, registers, tensor
cores, 64-bit offsets.

By default the first build of each kernel on sm_90: a chip takes half a minute, and other tests compile and execute the
kernels for sm_80 too. With LIMBER_FAST_GPU_BUILDS=first, as `make gpu` and `make gpu-matrix` set it, on every chip; all
builds with `make test-gpu-full` or LIMBER_FAST_GPU_BUILDS=all, as `make gpu-matrix BUILDS=all` sets it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from limber_fast.kernels import catalogue, info_nce_cases
from limber_fast.kernels.catalogue import INFORMATIVE_TARGETS, TARGETS, Case
from limber_fast.report.aot import compile_case, pool

BUILDS = [(which, target) for which in ("first", "all") for target in TARGETS]
ASKED = {"": [("first", "sm_90")], "first": BUILDS[: len(TARGETS)], "all": BUILDS}[
    os.environ.get("LIMBER_FAST_GPU_BUILDS", "")
]
MARKED = [pytest.param(*build, marks=() if build in ASKED else pytest.mark.slow_gpu) for build in BUILDS]


def chosen(target: str, which: str) -> Iterator[tuple[str, int, Case]]:
    """File, position and case of all builds, or of each kernel's first."""
    seen = set()
    for file, listed in catalogue.cases(target).items():
        for position, (case, _) in enumerate(listed):
            if which == "all" or case.kernel not in seen:
                yield file, position, case
            seen.add(case.kernel)


@pytest.mark.parametrize(("which", "target"), MARKED)
def test_builds_pass_the_gate(which, target):
    failures = pool.gate_all(target, [(file, position) for file, position, _ in chosen(target, which)])
    assert not failures, "\n".join(failures)


@pytest.mark.slow_gpu
@pytest.mark.parametrize("target", INFORMATIVE_TARGETS)
def test_informative_targets_are_reported(target):
    """What the first build of each kernel needs there, those of sm_80, which take no TMA: nothing has to fit."""
    for _, _, case in chosen("sm_80", "first"):
        build = compile_case(case, target)
        products = ", ".join(f"{count} {name}" for name, count in build.tensor_core.items())
        print(f"{case.name} on {target}: {build.registers} registers, {build.spill_loads} spilled, "
              f"{build.shared} bytes of LDS, {products or 'no MFMA'}")  # fmt: skip
        assert build.registers > 0, f"{case.name} on {target}: nothing is reported"


@pytest.mark.parametrize("target", TARGETS)
def test_cases_are_named_and_their_work_is_counted(target):
    for file, listed in catalogue.cases(target).items():
        for case, work in listed:
            assert work.programs >= 1 and work.loop_trips >= 1 and work.outer_trips >= 1, case.name
            assert work.dram_bytes > 0 and min(work.flops, work.l2_bytes) >= 0, case.name
            assert case.name.partition("/")[0] == case.kernel.__name__, f"{file}: {case.name}"


@pytest.mark.parametrize("target", info_nce_cases.TARGETS)
@pytest.mark.parametrize("rows", [1, 999, 2560, 5001, 20000])
def test_no_size_asks_for_a_build_of_its_own(target, rows):
    """Sizes are no constants of info_nce's builds, but for strips and bands, all of which are listed."""
    listed = {case.build for case, _ in info_nce_cases.cases(target)}
    for options in info_nce_cases.OPTIONS[::3]:
        for launch in info_nce_cases.launches(target, options, options.arithmetic[0], rows):
            case = launch.case(launch.kernel.__name__, False)
            assert case.build in listed, (case.name, launch.constants, case.divisible)


def test_cases_compile_in_other_processes(monkeypatch):
    builds = list(chosen("sm_90", "first"))[:2]
    if len(builds) < 2:
        pytest.skip("the catalogue is empty")
    monkeypatch.setattr(pool, "CASES_PER_PROCESS", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    places = [(file, position) for file, position, _ in builds]
    assert list(pool.compile_ahead("sm_90", places)) == [case.name for _, _, case in builds]
    assert pool.gate_all("sm_90", places) == []
