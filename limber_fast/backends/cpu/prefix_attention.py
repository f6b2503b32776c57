"""prefix_attention: no CPU kernel yet, and says so when it is asked."""

from __future__ import annotations

from typing import Any


def prefix_attention_supports(request: Any) -> str:
    return "no prefix_attention kernel in this release"
