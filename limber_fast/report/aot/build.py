"""Compiles a case for a GPU that need not be there and reads the result."""

from __future__ import annotations

import re
import subprocess
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from limber_fast.kernels.catalogue import Case
from limber_fast.report.aot import chips, sass

_SPILL_LOADS, _SPILL_STORES = ("LDL",), ("STL",)
_BUILDS: dict[tuple[object, ...], Build] = {}


@dataclass(frozen=True, eq=False)
class Build:
    """One compiled kernel. Bytes are per block, registers per thread, and spills are instructions in the code.

    Args:
        asm: every stage of the compiler as text, by its name in Triton: "ttir", "ttgir", "llir", and "ptx" or "amdgcn".
        metadata: Triton's own, with what a launch needs beside the code: `global_scratch_size`, `tmem_size`.
        shared_static, shared_dynamic: without the share that the system keeps in every block.
    """

    case: Case
    target: str
    asm: Mapping[str, str]
    metadata: Any
    registers: int
    stack: int
    shared_static: int
    shared_dynamic: int
    spill_loads: int
    spill_stores: int
    disassembly: str = ""

    @property
    def threads(self) -> int:
        """Threads of a block; warp specialisation adds warps to those of the case."""
        return self.metadata.num_warps * self.metadata.warp_size

    @property
    def shared(self) -> int:
        """Shared memory of a block, static and dynamic."""
        return self.shared_static + self.shared_dynamic

    @property
    def ptx(self) -> str:
        return self.asm["ptx"]

    @cached_property
    def instructions(self) -> tuple[sass.Instruction, ...]:
        """The code of the chip itself; empty for AMD."""
        return sass.parse(self.disassembly)

    @cached_property
    def opcodes(self) -> Counter[str]:
        """How often each instruction stands in the code."""
        return sass.histogram(self.instructions)

    @property
    def tensor_core(self) -> dict[str, int]:
        """Tensor-core instructions in the code, by mnemonic: HMMA (sm_80), HGMMA (sm_90), UTCHMMA (sm_100)."""
        if self.target.startswith("gfx"):
            return dict(Counter(re.findall(r"\bv_(?:mfma|wmma)\w+", self.asm["amdgcn"])))
        known = dict.fromkeys((*chips.CHIPS[self.target].tensor_instructions, *chips.WARP_PRODUCTS))
        return {name: self.opcodes[name] for name in known if self.opcodes[name]}

    @property
    def async_copies(self) -> dict[str, int]:
        """Copies from global to shared memory that pass no registers: LDGSTS (cp.async) and UTMALDG (TMA)."""
        return {name: self.opcodes[name] for name in ("LDGSTS", "UTMALDG") if self.opcodes[name]}


def compile_case(case: Case, target: str) -> Build:
    """Compiles for "sm_80", "sm_90", "sm_100" or an AMD "gfx..." target; once per process for equal cases."""
    import triton
    from triton.compiler import ASTSource

    kernel = jit_function(case.kernel)
    source = ASTSource(kernel, _signature(kernel, case), dict(case.constants), _attributes(kernel, case))
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
    key = (source.hash(), target, *sorted(options.items()))
    if key not in _BUILDS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # notices about the versions of Triton to come
            compiled = triton.compile(source, target=_gpu_target(target), options=options)
        read = _read_amd if target.startswith("gfx") else _read_nvidia
        _BUILDS[key] = read(case, target, compiled)
    return _BUILDS[key]


def jit_function(kernel: Any) -> Any:
    """The @triton.jit function under @triton.autotune and @triton.heuristics."""
    from triton.runtime.jit import JITFunction

    while not isinstance(kernel, JITFunction):
        kernel = kernel.fn
    return kernel


def _signature(kernel: Any, case: Case) -> dict[str, str]:
    missing = [name for name in kernel.arg_names if name not in case.constants and name not in case.signature]
    unknown = sorted({*case.constants, *case.signature, *case.divisible} - set(kernel.arg_names))
    if missing or unknown:
        raise ValueError(f"{case.name}: no type or value for {missing}; the kernel has no {unknown}")
    return {name: "constexpr" if name in case.constants else case.signature[name] for name in kernel.arg_names}


def _attributes(kernel: Any, case: Case) -> dict[tuple[int], list[list[object]]]:
    return {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in case.divisible}


def _gpu_target(target: str) -> Any:
    from triton.backends.compiler import GPUTarget

    if target.startswith("gfx"):
        return GPUTarget("hip", target, 64)
    return GPUTarget("cuda", chips.CHIPS[target].capability, chips.WARP)


def _read_nvidia(case: Case, target: str, compiled: Any) -> Build:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, disassembly = _cuobjdump("-res-usage", file.name), _cuobjdump("-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"{case.name}: cuobjdump does not say what the kernel needs: {usage}")
    registers, stack, static = map(int, found.groups())
    if chips.CHIPS[target].capability >= 90:
        static -= min(static, chips.SHARED_RESERVED)  # counted as static from sm_90 on
    opcodes = sass.histogram(sass.parse(disassembly))
    return Build(
        case, target, _texts(compiled), compiled.metadata, registers, stack, static, compiled.metadata.shared,
        sum(opcodes[name] for name in _SPILL_LOADS), sum(opcodes[name] for name in _SPILL_STORES), disassembly,
    )  # fmt: skip


def _read_amd(case: Case, target: str, compiled: Any) -> Build:
    code = compiled.asm["amdgcn"]

    def fact(name: str) -> int:
        found = re.search(rf"^\s*-?\s*\.{name}:\s*(\d+)", code, re.MULTILINE)
        return int(found[1]) if found else 0

    return Build(
        case, target, _texts(compiled), compiled.metadata, fact("vgpr_count"), fact("private_segment_fixed_size"),
        fact("group_segment_fixed_size"), compiled.metadata.shared, fact("vgpr_spill_count"), 0,
    )  # fmt: skip


def _texts(compiled: Any) -> dict[str, str]:
    return {stage: compiled.asm[stage] for stage in compiled.asm if isinstance(compiled.asm[stage], str)}


def _cuobjdump(*arguments: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout
