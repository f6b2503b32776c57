"""The products that the modelled report counts for whole passes are those of the formulas."""

from __future__ import annotations

import pytest

from limber_fast.kernels import frozen_cross_entropy_cases, int8_linear_cases, project_concat_cases
from limber_fast.kernels.catalogue import TARGETS


@pytest.mark.parametrize("target", TARGETS)
def test_int8_linear(target):
    """2 M N K forward and as much backward; tiles pad nothing here."""
    options = int8_linear_cases.OPTIONS[0]
    for name, launches in int8_linear_cases.steps(target).items():
        if "M=1 " not in name:
            assert sum(work.flops for _, work in launches) == 2 * options.M * options.N * options.K, name


@pytest.mark.parametrize("target", TARGETS)
def test_frozen_cross_entropy(target):
    """2 R V D of the labelled rows forward, as much for the gradient, up to the padding of the chunks' last tiles."""
    ((_, launches),) = frozen_cross_entropy_cases.steps(target).items()
    plain = frozen_cross_entropy_cases.OPTIONS[0]
    exact = 4 * plain.R * plain.V * plain.D
    assert exact <= sum(work.flops for _, work in launches) < 1.01 * exact


def test_project_concat():
    """2 rows D E forward and as much for each gradient; tiles pad nothing here."""
    plain = project_concat_cases.OPTIONS[0]
    flops = [project_concat_cases.work(x, "bf16").flops for x in project_concat_cases.launches("sm_90", plain, "bf16")]
    assert flops == [2 * project_concat_cases.B * project_concat_cases.K * plain.D * plain.E] * 3
