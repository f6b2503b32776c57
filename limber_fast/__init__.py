"""Fused kernels for CLIP contrastive training and LiMBeR captioning, drop-in for eager PyTorch."""

from limber_fast.dispatch import BackendUnavailable, use_backend
from limber_fast.integrations.transformers_gptj import PatchReport, patch, unpatch
from limber_fast.losses import ClipLoss, SigLipLoss
from limber_fast.models.gptj import GPTJ, GPTJConfig
from limber_fast.models.limber import Limber
from limber_fast.ops.frozen_cross_entropy import frozen_cross_entropy
from limber_fast.ops.info_nce import InfoNceStats, info_nce
from limber_fast.ops.int8_linear import Int8Weight, int8_linear, quantize_int8
from limber_fast.ops.prefix_attention import PagedBatch, prefix_attention, rotary_table
from limber_fast.ops.project_concat import project_concat

__version__ = "0.1.0"
__all__ = [
    "GPTJ",
    "BackendUnavailable",
    "ClipLoss",
    "GPTJConfig",
    "InfoNceStats",
    "Int8Weight",
    "Limber",
    "PagedBatch",
    "PatchReport",
    "SigLipLoss",
    "frozen_cross_entropy",
    "info_nce",
    "int8_linear",
    "patch",
    "prefix_attention",
    "project_concat",
    "quantize_int8",
    "rotary_table",
    "unpatch",
    "use_backend",
]
