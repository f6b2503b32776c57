"""Every build of frozen_cross_entropy's launchers: shared memory, spills, registers, tensor cores, 64-bit offsets."""

from __future__ import annotations

import pytest

from limber_fast.kernels import frozen_cross_entropy_cases
from limber_fast.kernels.catalogue import TARGETS
from limber_fast.report.aot import gate


def _refused(target: str, wanted) -> list[str]:
    return [
        line for case, _ in frozen_cross_entropy_cases.cases(target) if wanted(case.name) for line in gate(case, target)
    ]


@pytest.mark.parametrize("target", TARGETS)
def test_plain_builds(target):
    assert _refused(target, lambda name: name.partition("/")[2].endswith("plain-bf16")) == []


@pytest.mark.slow_gpu
@pytest.mark.parametrize("target", TARGETS)
def test_every_build(target):
    assert _refused(target, lambda name: True) == []


@pytest.mark.parametrize("target", TARGETS)
def test_a_step_multiplies_the_labelled_rows_twice(target):
    """2 R V D forward and as much for the gradient, up to the padding of the chunks' last tiles."""
    ((_, launches),) = frozen_cross_entropy_cases.steps(target).items()
    plain = frozen_cross_entropy_cases.OPTIONS[0]
    exact = 4 * plain.R * plain.V * plain.D
    assert exact <= sum(work.flops for _, work in launches) < 1.01 * exact
