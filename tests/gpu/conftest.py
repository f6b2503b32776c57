"""Without Triton there is nothing to check here, and the header says so."""

from __future__ import annotations

import importlib.util

_MISSING = importlib.util.find_spec("triton") is None
collect_ignore_glob = ["test_*.py"] if _MISSING else []


def pytest_report_header() -> str | None:
    return "tests/gpu: left out, Triton is not installed" if _MISSING else None
