"""Files that are whole or absent, and weights that are read without running anything."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limber_fast import checks, torchscript


def broken() -> tuple[type[Exception], ...]:
    """What torch.load answers a foreign or truncated file with: that depends on its first bytes and on its name."""
    from safetensors import SafetensorError

    return (
        SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, ValueError, LookupError,
        TypeError, AttributeError,
    )  # fmt: skip


def reason(error: Exception) -> str:
    """The first sentence of an error that may have none."""
    if str(error).startswith("Weights only load failed"):  # whose first sentence does not say what was found
        return "something else, or code"
    return (str(error).strip().splitlines() or [""])[0].partition(". ")[0] or type(error).__name__


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write: at the end it is flushed to disk and renamed to `path`, which holds a whole new file
    or the old one. What a killed run left half-written has the same name, and the next one replaces it."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace(path: Path, data: bytes | str) -> None:
    """`path` holds `data`, text in UTF-8, or what it held before."""
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def load_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The state dict of a .safetensors file, of a TorchScript archive or, by weights_only, of one of torch.save.

    Raises: ValueError with one line for anything else; OSError where there is no file.
    """
    path = Path(path)
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if torchscript.is_archive(path):
            return torchscript.state_of(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except broken() as error:
        contract = "be a state dict that holds tensors alone"
        raise checks.invalid(str(path), "the file", contract, reason(error)) from error
    if not isinstance(found, dict):
        raise checks.invalid(str(path), "the file", "hold a state dict", checks.kind_of(found))
    return found


def fill(
    module: nn.Module, found: Mapping[str, Any], source: str, *, prefix: str = "", optional: str | None = None
) -> None:
    """Copies a state dict into `module`, or raises before anything has changed; entries it does not know are left.

    Args: prefix: of the names in `found`. optional: how names end that may be missing.
    """
    wanted = {prefix + name: tensor for name, tensor in module.state_dict().items()}
    if optional is not None:
        wanted = {name: tensor for name, tensor in wanted.items() if name in found or not name.endswith(optional)}
    for name, tensor in wanted.items():
        given = found.get(name)
        if given is None:
            raise checks.invalid(source, "the file", f"hold {name!r}", f"{len(found)} other tensors")
        if not isinstance(given, Tensor):
            raise checks.invalid(source, f"tensor {name!r}", "be a tensor", checks.kind_of(given))
        if given.shape != tensor.shape:
            raise checks.invalid(source, f"tensor {name!r}", f"be {tuple(tensor.shape)}", checks.shape_of(given))
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(found[name])
