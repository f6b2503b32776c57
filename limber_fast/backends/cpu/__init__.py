"""The CPU backend: native kernels, one module per instruction set (csrc/cpu), on torch's own OpenMP threads."""

from limber_fast.backends.cpu.frozen_cross_entropy import (
    frozen_cross_entropy_bwd,
    frozen_cross_entropy_fwd,
    frozen_cross_entropy_supports,
)
from limber_fast.backends.cpu.info_nce import info_nce_bwd, info_nce_fwd, info_nce_supports, info_nce_total
from limber_fast.backends.cpu.int8_linear import int8_linear_bwd, int8_linear_fwd, int8_linear_supports
from limber_fast.backends.cpu.prefix_attention import prefix_attention_fwd, prefix_attention_supports
from limber_fast.backends.cpu.project_concat import project_concat_bwd, project_concat_fwd, project_concat_supports

__all__ = [
    "frozen_cross_entropy_bwd",
    "frozen_cross_entropy_fwd",
    "frozen_cross_entropy_supports",
    "info_nce_bwd",
    "info_nce_fwd",
    "info_nce_supports",
    "info_nce_total",
    "int8_linear_bwd",
    "int8_linear_fwd",
    "int8_linear_supports",
    "prefix_attention_fwd",
    "prefix_attention_supports",
    "project_concat_bwd",
    "project_concat_fwd",
    "project_concat_supports",
]
