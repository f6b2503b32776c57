"""What each kernel file says about its kernels: the builds its launchers ask for, and the work one launch does.

A kernel file, or a `<stem>_cases.py` beside it, has a function

    def cases(target: str) -> list[tuple[Case, Work]]

with every configuration its launchers can choose on that target. The checks that need no GPU (tests/gpu) compile, gate
and run them; `limber-fast bench --modelled` prices them. Nothing here imports Triton, so a list of cases costs nothing.
Beside it there may be a function

    def steps(target: str) -> dict[str, list[tuple[Case, Work]]]

with all launches of whole passes, by a name with the size of the problem.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100")  # sm_89: 99 KiB of shared memory a block, as 8.6
INFORMATIVE_TARGETS = ("gfx942",)  # compiled and reported, never gated


@dataclass(frozen=True, eq=False)
class Case:
    """One build of one kernel: what the compiler is given.

    Args:
        kernel: the @triton.jit function.
        name: the kernel's, then what sets this build apart: "info_nce_fwd_kernel/128x128x64-bf16".
        signature: type of every argument that is not in `constants`, in Triton's spelling: "*bf16", "i32", "fp32",
            "tensordesc<bf16[128, 64]>" for a descriptor made on the host.
        constants: value of every tl.constexpr argument, and of arguments specialised away (a pointer that is None).
        num_warps, num_stages: as at the launch.
        divisible: arguments that are multiples of 16: aligned pointers, row strides.
        tensor_core: whether its products must compile to tensor-core instructions.
        options: other options of the launch, such as {"maxnreg": 168}.
    """

    kernel: Any
    name: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    divisible: tuple[str, ...] = ()
    tensor_core: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def build(self) -> tuple[Any, ...]:
        """What tells builds apart."""
        return (self.kernel, tuple(self.signature.items()), tuple(self.constants.items()), self.divisible,
                self.num_warps, self.num_stages)  # fmt: skip


@dataclass(frozen=True)
class Work:
    """What one launch of a case does on one problem; every figure is a lower bound.

    Args:
        shape: the problem, as shown in the report: "N=32768 D=512".
        flops: floating-point operations of its matrix products, two per multiply-add, padding of the tiles included.
        dram_bytes: compulsory traffic: every input read once, every output written once.
        l2_bytes: bytes that the programs together ask of the L2 cache.
        programs: size of the grid.
        loop_trips: how often a program runs its main loop: the one with the products, else its only one.
        dtype: operand type of the products: "bf16", "fp16", "tf32", "fp32" (not on the tensor cores), "int8", "fp8".
        outer_trips: how often it runs the loop around that one, for programs that walk over tiles.
        outermost_trips: how often it runs the loop around that one in turn, for programs that walk over strips of them.
        imbalance: what the busiest program multiplies over the mean.
    """

    shape: str
    flops: float
    dram_bytes: float
    l2_bytes: float
    programs: int
    loop_trips: int = 1
    dtype: str = "bf16"
    outer_trips: int = 1
    outermost_trips: int = 1
    imbalance: float = 1.0


def cases(target: str) -> dict[str, list[tuple[Case, Work]]]:
    """The cases of every kernel file that has any, by module name."""
    return {stem: listed(target) for stem, listed in _functions("cases").items()}


def steps(target: str) -> dict[str, list[tuple[Case, Work]]]:
    """Every launch of the passes that kernel files list, by name."""
    return {name: launches for listed in _functions("steps").values() for name, launches in listed(target).items()}


def _functions(name: str) -> dict[str, Callable[[str], Any]]:
    package = importlib.import_module("limber_fast.kernels")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.name != "catalogue")
    modules = {stem: importlib.import_module(f"{package.__name__}.{stem}") for stem in names}
    return {stem: getattr(module, name) for stem, module in modules.items() if hasattr(module, name)}
