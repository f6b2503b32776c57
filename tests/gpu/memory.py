"""Traps what a GPU would not forgive in an interpreted kernel: accesses out of bounds and races between programs.

The interpreter runs programs one after the other, so a race never shows in its results. Here every element remembers
which program wrote and which read it since the launch began; another program that then writes it, or reads what was
written, is a race, as nothing orders the two. Atomics may meet atomics, nothing else. One that waits for others by
an atomic counter and then reads what they stored is reported too: this project merges in a second launch instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

NOBODY, SEVERAL = -1, -2
KINDS = ("load", "store", "atomic")
_TRAPPED = ("set_grid_dim", "create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas")


class Violation(AssertionError):
    """An access out of bounds, or a race."""


@dataclass
class _Region:
    """The elements of one tensor, by their place in its memory; padding between strided rows is out of bounds."""

    name: str
    tensor: Tensor
    inside: np.ndarray = field(init=False)
    users: dict[str, np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        shape, strides = self.tensor.shape, self.tensor.stride()
        extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        inside = torch.zeros(extent if self.tensor.numel() else 0, dtype=torch.bool)
        if self.tensor.numel():
            inside.as_strided(shape, strides).fill_(True)
        self.inside = inside.numpy()
        self.forget()

    def forget(self) -> None:
        self.users = {kind: np.full(self.inside.size, NOBODY, np.int64) for kind in KINDS}

    def elements(self, addresses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which addresses are elements of this tensor, and which elements those are."""
        places = (addresses - np.uint64(self.tensor.data_ptr())).astype(np.int64) // self.tensor.element_size()
        found = (places >= 0) & (places < self.inside.size)
        found[found] = self.inside[places[found]]
        return found, places[found]

    def visit(self, kind: str, places: np.ndarray, program: int) -> str | None:
        """Notes the access; the kind of another program's earlier one that it races with, if any."""
        for other in _CONFLICTS[kind]:
            users = self.users[other][places]
            if ((users != NOBODY) & (users != program)).any():
                return other
        users = self.users[kind]
        users[places] = np.where((users[places] == NOBODY) | (users[places] == program), program, SEVERAL)
        return None


_CONFLICTS = {"load": ("store", "atomic"), "store": KINDS, "atomic": ("load", "store")}


@contextlib.contextmanager
def checked(*tensors: Tensor, **named: Tensor) -> Iterator[None]:
    """Every access of interpreted kernels inside the block must lie in one of the tensors and race with none.

    Raises:
        Violation: from the launch. Each launch starts afresh: the end of the one before orders all its accesses.
    """
    everything = {**{f"tensor {number}": tensor for number, tensor in enumerate(tensors)}, **named}
    regions = [_Region(name, tensor) for name, tensor in everything.items()]
    with contextlib.ExitStack() as stack:
        for name, replacement in _traps(regions).items():
            stack.enter_context(mock.patch.object(InterpreterBuilder, name, replacement))
        yield


def _traps(regions: Sequence[_Region]) -> dict[str, Any]:
    """The builder's methods with a look at the addresses first. Descriptors load and store through the masked ones."""
    stock = {name: getattr(InterpreterBuilder, name) for name in _TRAPPED}

    def begin(self: InterpreterBuilder, *size: int) -> None:
        for region in regions:
            region.forget()
        stock["set_grid_dim"](self, *size)

    def load(self: InterpreterBuilder, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        _visit(self, regions, "load", pointers, mask)
        return stock["create_masked_load"](self, pointers, mask, *rest, **options)

    def store(self: InterpreterBuilder, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        _visit(self, regions, "store", pointers, mask)
        return stock["create_masked_store"](self, pointers, value, mask, *rest, **options)

    def atomic(self: InterpreterBuilder, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        _visit(self, regions, "atomic", pointers, mask)
        return stock["create_atomic_rmw"](self, operation, pointers, value, mask, *rest)

    def swap(self: InterpreterBuilder, pointers: Any, *rest: Any) -> Any:
        _visit(self, regions, "atomic", pointers, None)
        return stock["create_atomic_cas"](self, pointers, *rest)

    return dict(zip(stock, (begin, load, store, atomic, swap), strict=True))


def _visit(builder: InterpreterBuilder, regions: Sequence[_Region], kind: str, pointers: Any, mask: Any) -> None:
    addresses = np.asarray(pointers.data).astype(np.uint64)
    if mask is not None:
        addresses, chosen = np.broadcast_arrays(addresses, np.asarray(mask.data))
        addresses = addresses[chosen]
    addresses = np.unique(addresses)
    program = int(np.ravel_multi_index(builder.grid_idx, builder.grid_dim))
    for region in regions:
        if not addresses.size:
            return
        found, places = region.elements(addresses)
        if (other := region.visit(kind, places, program)) is not None:
            raise Violation(f"race in {region.name}: {kind} by program {builder.grid_idx} after another's {other}")
        addresses = addresses[~found]
    if addresses.size:
        what = f"{kind} of {addresses.size} elements by program {builder.grid_idx}"
        raise Violation(f"out of bounds: {what}, {_whereabouts(addresses, regions)}")


def _whereabouts(addresses: np.ndarray, regions: Sequence[_Region]) -> str:
    """The first address as a distance from the tensor that begins last before it."""
    first = int(addresses[0])
    before = [region for region in regions if region.tensor.data_ptr() <= first]
    if not before:
        return "before every tensor"
    nearest = max(before, key=lambda region: region.tensor.data_ptr())
    offset = (first - nearest.tensor.data_ptr()) // nearest.tensor.element_size()
    return f"the first at element {offset} of {nearest.name}, which has shape {tuple(nearest.tensor.shape)}"
