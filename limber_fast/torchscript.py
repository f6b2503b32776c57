"""The tensors of a TorchScript archive, as OpenAI's CLIP files are, without running anything of it.

torch.jit.load runs no pickled Python, but it does run the archive's own TorchScript (`__setstate__`, which may write
files), and weights_only refuses such archives. Here data.pkl is unpickled with the few names that tensors need.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_STORAGES = {
    "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16, "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64, "BoolStorage": torch.bool, "ByteStorage": torch.uint8, "CharStorage": torch.int8,
    "ShortStorage": torch.int16, "IntStorage": torch.int32, "LongStorage": torch.int64,
}  # fmt: skip
_LISTS = {"build_intlist", "build_doublelist", "build_boollist", "build_tensorlist", "restore_type_tag"}


class _Module:
    """In the place of every class of the archive: its attributes by name."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError("a TorchScript archive whose own code is needed to load it")
        self.state = state


def is_archive(path: Path) -> bool:
    """Whether this is a TorchScript archive, which a file of torch.save is told from by its constants."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        return any(name.endswith("/constants.pkl") for name in file.namelist())


def state_of(path: Path) -> dict[str, Tensor]:
    """Its parameters, buffers and other attributes that are tensors, named as by state_dict.

    Raises: pickle.UnpicklingError for anything else in it, and what zipfile, pickle and torch raise for a broken one.
    """
    with zipfile.ZipFile(path) as file:
        members = [name for name in file.namelist() if name.endswith("/data.pkl")]
        if len(members) != 1:
            raise pickle.UnpicklingError(f"a TorchScript archive with {len(members)} data.pkl")
        with file.open(members[0]) as data:
            found = _Unpickler(data, file, members[0].removesuffix(".pkl")).load()
    if not isinstance(found, _Module):
        raise pickle.UnpicklingError(f"a TorchScript archive of {type(found).__name__}")
    return dict(_tensors(found, ""))


def _tensors(module: _Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in module.state.items():
        if isinstance(value, _Module):
            yield from _tensors(value, f"{prefix}{name}.")
        elif isinstance(value, Tensor):
            yield prefix + name, value


class _Unpickler(pickle.Unpickler):
    """Knows tensors, their storages and modules; every other name is refused."""

    def __init__(self, data: Any, file: zipfile.ZipFile, folder: str) -> None:
        super().__init__(data)
        self._file, self._folder, self._storages = file, folder, {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuilt
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle" and name in _LISTS:
            return _first
        raise pickle.UnpicklingError(f"a TorchScript archive that asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, *_ = pid
        if key not in self._storages:
            data = bytearray(self._file.read(f"{self._folder}/{key}"))
            self._storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self._storages[key]


def _rebuilt(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return storage.as_strided(size, stride, offset)


def _first(value: Any, *_: Any) -> Any:
    return value
