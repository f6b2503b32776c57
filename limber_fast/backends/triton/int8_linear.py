"""int8_linear: no Triton kernel yet, and says so when it is asked."""

from __future__ import annotations

from typing import Any


def int8_linear_supports(request: Any) -> str:
    return "no int8_linear kernel in this release"
