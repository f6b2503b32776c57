"""Every build that info_nce's launchers ask for: shared memory, spills, registers, tensor cores, 64-bit offsets."""

from __future__ import annotations

import pytest

from limber_fast.kernels import info_nce_cases
from limber_fast.report.aot import gate


def _refused(target: str, wanted) -> list[str]:
    return [line for case, _ in info_nce_cases.cases(target) if wanted(case.name) for line in gate(case, target)]


@pytest.mark.parametrize("target", info_nce_cases.TARGETS)
def test_plain_builds(target):
    assert _refused(target, lambda name: name.endswith(("/plain-bf16", "/plain-tf32"))) == []


@pytest.mark.slow_gpu
@pytest.mark.parametrize("target", info_nce_cases.TARGETS)
def test_every_build(target):
    assert _refused(target, lambda name: True) == []


def test_the_work_of_a_step_is_eight_products():
    """2 N M D forward, 2 to recompute, 4 for the gradients, as the report adds them up; tiles pad nothing here."""
    flops = sum(
        info_nce_cases.work(launch, "bf16").flops
        for launch in info_nce_cases.launches("sm_90", info_nce_cases.OPTIONS[0], "bf16")
    )
    assert flops == 8 * info_nce_cases.N**2 * info_nce_cases.OPTIONS[0].D
