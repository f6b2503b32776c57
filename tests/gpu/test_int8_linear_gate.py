"""Every build of int8_linear's launchers: shared memory, spills, registers, tensor cores, 64-bit offsets."""

from __future__ import annotations

import pytest

from limber_fast.kernels import int8_linear_cases
from limber_fast.kernels.catalogue import TARGETS
from limber_fast.report.aot import gate

LARGE = ("/plain-bf16", "/w8a8_plain-bf16", "/decode-bf16", "/gelu-bf16")


def _refused(target: str, wanted) -> list[str]:
    return [line for case, _ in int8_linear_cases.cases(target) if wanted(case.name) for line in gate(case, target)]


@pytest.mark.parametrize("target", TARGETS)
def test_plain_builds(target):
    assert _refused(target, lambda name: name.endswith(LARGE)) == []


@pytest.mark.slow_gpu
@pytest.mark.parametrize("target", TARGETS)
def test_every_build(target):
    assert _refused(target, lambda name: True) == []


@pytest.mark.parametrize("target", TARGETS)
def test_the_products_of_a_step_are_those_of_the_formula(target):
    """2 M N K forward and as much backward; tiles pad nothing here."""
    options = int8_linear_cases.OPTIONS[0]
    for name, launches in int8_linear_cases.steps(target).items():
        if "M=1 " not in name:
            assert sum(work.flops for _, work in launches) == 2 * options.M * options.N * options.K, name
