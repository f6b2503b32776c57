"""Packages that only some features need."""

from __future__ import annotations

import re
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_REQUIREMENT = re.compile(r"([\w.-]+).*extra == ['\"]([\w-]+)['\"].*")
_DISTRIBUTIONS = {"open_clip": "open_clip_torch", "PIL": "pillow", "sklearn": "scikit-learn"}


def needed(module: str, what: str) -> Any:
    """The module, or one line that says what needs it and how to get it.

    Raises: ModuleNotFoundError.
    """
    top = module.partition(".")[0]
    try:
        if top == "transformers":
            _settle_kernels()
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != top:
            raise  # the package is there; something that it needs is not
        package = _DISTRIBUTIONS.get(top, top)
        raise ModuleNotFoundError(f"{what} needs {package}: pip install {package}", name=top) from error


def how_to_install(module: str, extra: str) -> str:
    """The command for a module that is missing: the extra that has it, else the package alone."""
    package = _DISTRIBUTIONS.get(module, module)
    try:
        listed = [_REQUIREMENT.fullmatch(line) for line in requires("limber_fast") or ()]
    except PackageNotFoundError:  # imported from a checkout
        listed = []
    inside = {found[2] for found in listed if found and found[1].lower().replace("_", "-") == package.replace("_", "-")}
    return f"pip install 'limber_fast[{extra}]'" if extra in inside else f"pip install {package}"


def _settle_kernels() -> None:
    """Lets transformers ask for the package `kernels` (of Hugging Face) without meeting our folder of that name,
    which is on sys.path where Python was started in the repository. It asks once and remembers."""
    ours = str(Path(__file__).resolve().parents[1] / "kernels" / "__init__.py")
    if "kernels" in sys.modules or getattr(find_spec("kernels"), "origin", None) != ours:
        return
    sys.modules["kernels"] = None
    try:
        import_module("transformers.utils.import_utils").is_kernels_available()
    finally:
        del sys.modules["kernels"]
