"""The eager backend: dense torch ops on any device and floating dtype. The one that always runs.

Products are taken in the dtype of their operands, as eager PyTorch takes them; everything between them is fp32 (fp64
for fp64 operands). Gradients are written out because autograd is off inside an op.
"""

from limber_fast.backends.eager.frozen_cross_entropy import (
    frozen_cross_entropy_bwd,
    frozen_cross_entropy_fwd,
    frozen_cross_entropy_supports,
)
from limber_fast.backends.eager.info_nce import info_nce_bwd, info_nce_fwd, info_nce_supports
from limber_fast.backends.eager.int8_linear import int8_linear_bwd, int8_linear_fwd, int8_linear_supports
from limber_fast.backends.eager.prefix_attention import prefix_attention_fwd, prefix_attention_supports
from limber_fast.backends.eager.project_concat import project_concat_bwd, project_concat_fwd, project_concat_supports

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
