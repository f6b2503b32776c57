"""Launches written down instead of run: a catalogue of builds that cannot drift from the launchers it comes from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from limber_fast.kernels.catalogue import Case

_TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64", torch.int8: "i8",
    torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
_LAUNCH_OPTIONS = ("num_warps", "num_stages", "maxnreg", "num_ctas")


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid, its arguments by name and the options of its launch."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, Any]

    def case(self, name: str, tensor_core: bool) -> Case:
        """The build that this launch asks the compiler for, specialised as Triton's launcher specialises it."""
        fixed = {parameter.name for parameter in self.kernel.params if parameter.do_not_specialize}
        special = {key: value for key, value in self.arguments.items() if key not in fixed}
        aligned = [key for key, value in special.items() if _divisible(value)]
        ones = {key: 1 for key, value in special.items() if type(value) is int and value == 1}
        signature = {key: _type(value) for key, value in self.arguments.items() if key not in ones}
        options = {key: value for key, value in self.options.items() if key not in ("num_warps", "num_stages")}
        return Case(
            kernel=self.kernel, name=name, signature=signature, constants={**self.constants, **ones},
            num_warps=self.options.get("num_warps", 4), num_stages=self.options.get("num_stages", 3),
            divisible=tuple(aligned), tensor_core=tensor_core, options=options,
        )  # fmt: skip


def launch_of(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], grid: Any) -> Launch:
    """What `kernel[grid](*args, **kwargs)` asks for."""
    options = {key: value for key, value in kwargs.items() if key in _LAUNCH_OPTIONS}
    given = dict(zip(kernel.arg_names, args, strict=False))
    given |= {key: value for key, value in kwargs.items() if key not in options}
    constant = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    arguments = {key: given[key] for key in kernel.arg_names if key not in constant}
    constants = {key: given[key] for key in kernel.arg_names if key in constant}
    return Launch(kernel, tuple(grid(given) if callable(grid) else grid), arguments, constants, options)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Every Triton launch inside the block is appended to the list and does nothing else: outputs are not written."""
    launches: list[Launch] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        launches.append(launch_of(self, args, kwargs, grid))

    original = JITFunction.run
    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = original


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"*{_TYPES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _divisible(value: Any) -> bool:
    return value.data_ptr() % 16 == 0 if isinstance(value, torch.Tensor) else type(value) is int and value % 16 == 0
