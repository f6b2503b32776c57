"""Every build of project_concat's launchers: shared memory, spills, registers, tensor cores, 64-bit offsets."""

from __future__ import annotations

import pytest

from limber_fast.kernels import project_concat_cases
from limber_fast.kernels.catalogue import TARGETS
from limber_fast.report.aot import gate


def _refused(target: str, wanted) -> list[str]:
    return [line for case, _ in project_concat_cases.cases(target) if wanted(case.name) for line in gate(case, target)]


@pytest.mark.parametrize("target", TARGETS)
def test_plain_builds(target):
    assert _refused(target, lambda name: name.endswith(("/plain-bf16", "/dropout-bf16", "/norm-bf16"))) == []


@pytest.mark.slow_gpu
@pytest.mark.parametrize("target", TARGETS)
def test_every_build(target):
    assert _refused(target, lambda name: True) == []


def test_the_work_of_a_step_is_three_products():
    """2 rows D E forward and as much for each gradient, as the report adds them up; tiles pad nothing here."""
    plain = project_concat_cases.OPTIONS[0]
    flops = [project_concat_cases.work(x, "bf16").flops for x in project_concat_cases.launches("sm_90", plain, "bf16")]
    assert flops == [2 * project_concat_cases.B * project_concat_cases.K * plain.D * plain.E] * 3
