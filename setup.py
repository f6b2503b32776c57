"""Native modules: a C++17 compiler and pybind11 build them, nvcc adds the CUDA one. Never torch, never the network.

A module that this machine cannot build is skipped with a printed reason; `limber_fast` imports without it and names the
remedy at the call. Metadata lives in pyproject.toml.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError, CompileError
from setuptools.modified import newer_group

HEADERS = sorted(str(path) for path in Path("csrc").rglob("*.*h"))
CXX_FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-g0"]
CPU_FLAGS = [
    *CXX_FLAGS, "-fopenmp", "-fno-math-errno",
    # A hot loop across two cache lines took 5 to 9% of project_concat's backward (one soft prompt, D = 2048, fp32).
    "-falign-loops=64",
    # GCC 12 takes the undefined operands of its own AVX-512 intrinsics for uninitialised variables.
    "-Wno-uninitialized", "-Wno-maybe-uninitialized",
]  # fmt: skip
X86 = re.search("x86_64|amd64", sysconfig.get_platform()) is not None
AVX512_FLAGS = ["-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16", "-mprfchw", "-mprefer-vector-width=512"]
# No -march=native: a wheel must run on any machine; Python loads the best of these that the CPU has.
ISA_FLAGS = {
    "baseline": ["-march=x86-64-v2"] if X86 else [],
    "avx2": ["-march=x86-64-v3"],
    "avx512": AVX512_FLAGS,
    "amx": [*AVX512_FLAGS, "-mamx-tile", "-mamx-bf16", "-mamx-int8"],
}
CUDA_ARCHITECTURES = ("80", "90a", "100")


def cpu_extension(isa: str) -> Extension:
    """One instruction set of the CPU sources."""
    return Extension(
        f"limber_fast._cpu_{isa}",
        sources=["csrc/bindings/cpu.cpp", *sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))],
        depends=[*HEADERS, "setup.py"],
        include_dirs=["csrc", pybind11.get_include()],
        define_macros=[(f"LIMBER_ISA_{isa.upper()}", "1"), ("LIMBER_MODULE", f"_cpu_{isa}")],
        extra_compile_args=[*CPU_FLAGS, *ISA_FLAGS[isa]],
        extra_link_args=[
            "-fopenmp"
        ],  # resolves to libgomp.so.1, the SONAME torch's own copy carries: one pool for both
        language="c++",
        optional=True,
    )


class CudaExtension(Extension):
    """`limber_fast._cuda`: kernels by nvcc, bindings by the C++ compiler, which is three times as fast on pybind11."""

    def __init__(self, mode: str) -> None:
        if mode not in ("0", "1", "auto"):
            raise SystemExit(f"LIMBER_FAST_CUDA must be 0, 1 or auto; got {mode!r}")
        self.mode = mode
        self.kernels = sorted(str(path) for path in Path("csrc/cuda").glob("*.cu"))
        super().__init__(
            "limber_fast._cuda",
            sources=["csrc/bindings/cuda.cpp"],
            depends=[*self.kernels, *HEADERS, "setup.py"],
            include_dirs=["csrc", pybind11.get_include()],
            extra_compile_args=CXX_FLAGS,
            # torch puts its libcudart into the global scope: with ours visible the loader would bind our calls to that.
            extra_link_args=["-Wl,--exclude-libs,ALL"],
            libraries=["cudart_static", "dl", "rt", "pthread"],
            language="c++",
            optional=mode != "1",
        )

    def compile_kernels(self, folder: str) -> None:
        """Compiles every .cu for the architectures this nvcc knows and hands the objects to the C++ link."""
        nvcc = find_nvcc(self.mode)
        known = run(nvcc, "--list-gpu-code").split()
        targets = [arch for arch in CUDA_ARCHITECTURES if f"sm_{arch.rstrip('a')}" in known]
        newest = targets[-1].rstrip("a")  # PTX of an 'a' architecture runs on no later chip
        code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in targets]
        code.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
        # A spill is slow, not wrong: only the strict build refuses it.
        checks = "-Xptxas=-warn-spills,-warn-lmem-usage" + (",-Werror" if self.mode == "1" else "")
        flags = [
            "-O3",
            "-std=c++17",
            "-lineinfo",
            "-Icsrc",
            "--threads=0",
            "-Xcompiler=-fPIC,-fvisibility=hidden",
            checks,
        ]

        Path(folder).mkdir(parents=True, exist_ok=True)
        self.extra_objects = [os.path.join(folder, f"{Path(kernel).stem}.cu.o") for kernel in self.kernels]
        for kernel, target in zip(self.kernels, self.extra_objects, strict=True):
            if newer_group([kernel, *HEADERS, "setup.py"], target):
                print(run(nvcc, *flags, *code, "-c", kernel, "-o", target), end="", flush=True)

        # nvcc may be a wrapper far from its toolkit: its own dry run is the one reliable word on where cudart lies.
        dry_run = run(nvcc, "--dryrun", *self.kernels, "-o", "a.out")
        self.library_dirs = re.findall(r'-L([^"\s]+)', dry_run[dry_run.find("LIBRARIES=") :].partition("\n")[0])
        names = " ".join([*(f"sm_{arch}" for arch in targets), f"compute_{newest}"])
        self.define_macros = [("LIMBER_CUDA_TARGETS", f'"{names}"')]


def find_nvcc(mode: str) -> str:
    """Path of nvcc, from CUDA_HOME or PATH; CompileError where the module is not wanted or cannot be built."""
    if mode == "0":
        raise CompileError("LIMBER_FAST_CUDA=0")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if nvcc is None:
        raise CompileError(f"no nvcc in {home}/bin" if home else "no nvcc on PATH, and CUDA_HOME is not set")
    return nvcc


def run(*command: str) -> str:
    """Output of a build tool; where it fails, its own words are the error."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise CompileError(f"{' '.join(command)}\n{done.stdout}")
    return done.stdout


class BuildExt(build_ext):
    """Builds the modules side by side; those marked optional may fail, each with its reason on one line."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def build_extension(self, ext: Extension) -> None:
        module = copy.copy(self)  # modules share a source: each needs an object folder of its own
        module.build_temp = os.path.join(self.build_temp, ext.name)
        try:
            if isinstance(ext, CudaExtension):
                ext.compile_kernels(module.build_temp)
            super(BuildExt, module).build_extension(ext)
        except (CCompilerError, BaseError) as error:
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
            if not ext.optional:
                raise
            print(f"{ext.name}: skipped: {error}", flush=True)

    def copy_extensions_to_source(self) -> None:
        # What an earlier build left in the source tree must not outlive the sources it came from.
        for ext in self.extensions:
            Path(self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        super().copy_extensions_to_source()


setup(
    packages=[*find_packages(include=["limber_fast", "limber_fast.*"]), "limber_fast.kernels"],
    package_dir={"limber_fast.kernels": "kernels"},
    package_data={
        "limber_fast": [f"data/**/{kind}" for kind in ("*.png", "*.json", "*.txt", "*.md", "*.safetensors", "LICENSE*")]
        + [f"report/**/*.{kind}" for kind in ("html", "css", "js")]
    },
    include_package_data=False,
    ext_modules=[
        CudaExtension(os.environ.get("LIMBER_FAST_CUDA", "auto")),
        *(cpu_extension(isa) for isa in (ISA_FLAGS if X86 else ["baseline"])),
    ],
    cmdclass={"build_ext": BuildExt},
)
