"""The Triton backend (CUDA tensors): kernels/<stem>.py, compiled on first use for the device at hand."""

from limber_fast.backends.triton.frozen_cross_entropy import (
    frozen_cross_entropy_bwd,
    frozen_cross_entropy_fwd,
    frozen_cross_entropy_supports,
)
from limber_fast.backends.triton.info_nce import info_nce_bwd, info_nce_fwd, info_nce_supports
from limber_fast.backends.triton.int8_linear import int8_linear_bwd, int8_linear_fwd, int8_linear_supports
from limber_fast.backends.triton.prefix_attention import prefix_attention_fwd, prefix_attention_supports
from limber_fast.backends.triton.project_concat import (
    project_concat_bwd,
    project_concat_fwd,
    project_concat_supports,
)

__all__ = [
    "frozen_cross_entropy_bwd",
    "frozen_cross_entropy_fwd",
    "frozen_cross_entropy_supports",
    "info_nce_bwd",
    "info_nce_fwd",
    "info_nce_supports",
    "int8_linear_bwd",
    "int8_linear_fwd",
    "int8_linear_supports",
    "prefix_attention_fwd",
    "prefix_attention_supports",
    "project_concat_bwd",
    "project_concat_fwd",
    "project_concat_supports",
]
