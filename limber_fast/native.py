"""Loads the native modules: the CPU kernels of the best instruction set this machine has, and the CUDA kernels."""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType

# torch first: its libgomp.so.1 is then the one the kernels' own dependency of that name resolves to, so that both run
# on one thread pool and torch.set_num_threads rules it.
import torch  # noqa: F401

from limber_fast.dispatch import BackendUnavailable

ISA_VARIABLE = "LIMBER_FAST_CPU_ISA"

_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni", "avx512bf16")
# Slowest first: the CPU features that each module's compiler flags rely on.
ISA_FEATURES: dict[str, tuple[str, ...]] = {
    "baseline": (),
    "avx2": ("avx2", "fma", "f16c"),
    "avx512": _AVX512,
    "amx": (*_AVX512, "amx_tile", "amx_bf16", "amx_int8"),
}


def cpu() -> ModuleType:
    """The CPU kernels of `cpu_isa()`.

    Raises:
        BackendUnavailable: no module was built, or `LIMBER_FAST_CPU_ISA` names one that the CPU or the build lacks.
    """
    return _module(f"_cpu_{cpu_isa()}")


def cpu_isa() -> str:
    """Name of the instruction set in use: `LIMBER_FAST_CPU_ISA` if set, else the best of `available_isas()`."""
    return _choose_isa(os.environ.get(ISA_VARIABLE, ""))


@functools.cache
def cpu_features() -> dict[str, bool]:
    """CPU features as the baseline module reads them; it runs on every x86-64-v2 machine and on Arm."""
    return _module("_cpu_baseline").cpu_features()


@functools.cache
def available_isas() -> tuple[str, ...]:
    """Instruction sets, slowest first, that were built and that this CPU has; empty where no module was built."""
    return tuple(isa for isa in ISA_FEATURES if isa_refusal(isa) is None)


@functools.cache
def isa_refusal(isa: str) -> str | None:
    """None where the kernels of `isa` can run here, else the reason why not."""
    try:
        missing = [name for name in ISA_FEATURES[isa] if not cpu_features().get(name, False)]
        if missing:
            return f"this CPU lacks {', '.join(missing)}"
        _module(f"_cpu_{isa}")
    except BackendUnavailable as error:
        return str(error)
    return None


def cuda() -> ModuleType:
    """The CUDA kernels; importable without a driver, whose absence is the RuntimeError of the first call.

    Raises:
        BackendUnavailable: the module was not built.
    """
    return _module("_cuda")


@functools.cache
def _choose_isa(override: str) -> str:
    if not override:
        for isa in reversed(ISA_FEATURES):
            if isa_refusal(isa) is None:
                return isa
        raise BackendUnavailable(isa_refusal("baseline"))
    if override not in ISA_FEATURES:
        raise BackendUnavailable(f"{ISA_VARIABLE} must be one of {', '.join(ISA_FEATURES)}; got {override!r}")
    if (reason := isa_refusal(override)) is not None:
        usable = ", ".join(available_isas()) or "none"
        raise BackendUnavailable(f"{ISA_VARIABLE}={override}: {reason}; usable here: {usable}")
    return override


@functools.cache
def _module(name: str) -> ModuleType:
    full_name = f"limber_fast.{name}"
    try:
        return importlib.import_module(full_name)
    except ModuleNotFoundError as error:
        if error.name != full_name:
            raise
        needs = "nvcc (CUDA_HOME or PATH)" if name == "_cuda" else "a C++17 compiler (g++ 11 or newer)"
        raise BackendUnavailable(
            f"{full_name} was not built: install with {needs}; `pip install -v` shows why"
        ) from None
    except ImportError as error:
        raise BackendUnavailable(
            f"{full_name} was built but does not load ({error}); rebuild it on this machine"
        ) from error
