"""The CUDA C++ backend (CUDA tensors). It has no kernels in this release, and says so when it is asked."""

from __future__ import annotations

from typing import Any


def info_nce_supports(request: Any) -> str:
    return "no info_nce kernel in this release"


def project_concat_supports(request: Any) -> str:
    return "no project_concat kernel in this release"


def int8_linear_supports(request: Any) -> str:
    return "no int8_linear kernel in this release"


def frozen_cross_entropy_supports(request: Any) -> str:
    return "no frozen_cross_entropy kernel in this release"


def prefix_attention_supports(request: Any) -> str:
    return "no prefix_attention kernel in this release"
