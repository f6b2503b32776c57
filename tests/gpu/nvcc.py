"""The CUDA extension on a machine without a GPU: its sources compiled for a chip as PTX, and for the host's CPU.

    with emulated(seed=3):
        prefix_attention(..., backend="cuda")           # on CPU tensors, through the production adapter and launcher
    with executed("sm_80", races=True):
        prefix_attention(..., backend="cuda")           # the same, by the executor of compiled PTX
"""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from gpu.ptx import execute
from limber_fast import dispatch, native
from limber_fast.backends import cuda
from limber_fast.report.aot import sass
from limber_fast.report.aot.build import _cuobjdump

ROOT = Path(__file__).parents[2]
EMULATION = Path(__file__).parent / "emulation"

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@functools.cache
def folder() -> Path:
    """Where this process keeps what it compiles; removed at its end."""
    folder.kept = tempfile.TemporaryDirectory()
    return Path(folder.kept.name)


def source(stem: str) -> str:
    return f"csrc/cuda/{stem}.cu"


@functools.cache
def ptx_file(stem: str, target: str) -> Path:
    """PTX of all kernels of a source; sm_90 is compiled as sm_90a, as setup.py does it."""
    path = folder() / f"{stem}_{target}.ptx"
    _compile("-ptx", source(stem), target, path)
    return path


@functools.cache
def ptx(stem: str, target: str) -> str:
    return ptx_file(stem, target).read_text()


@functools.cache
def ptx_of_kernel(stem: str, kernel: str, target: str) -> str:
    """The module with only one of its kernels, by its mangled name, and the names of the source's files."""
    text = ptx(stem, target)
    head, *entries = re.split(r"^(?=\.(?:visible|weak) \.entry )", text, flags=re.MULTILINE)
    (found,) = (entry for entry in entries if f" {kernel}(" in entry.partition("\n")[0])
    files = re.findall(r"^\s*\.file\s.*\n", text, flags=re.MULTILINE)
    return "".join([head, found[: found.rindex("\n}")], "\n}\n", *files])


def _compile(kind: str, file: str | Path, target: str, to: Path) -> None:
    run("nvcc", kind, "-O3", "-lineinfo", "-std=c++17", "-Icsrc", f"-arch={target.replace('90', '90a')}",
        "-o", str(to), str(file))  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """What ptxas made of one kernel: registers and bytes of stack of a thread, and how often each opcode occurs."""

    registers: int
    stack: int
    opcodes: dict[str, int]


def assembled(file: str | Path, target: str) -> dict[str, Kernel]:
    """Every kernel of a source or of PTX as a cubin for the target, by its mangled name."""
    path = folder() / f"{target}.cubin"
    _compile("-cubin", file, target, path)
    usage, code = _cuobjdump("-res-usage", str(path)), _cuobjdump("-sass", str(path))
    needs = {
        name: (int(registers), int(stack))
        for name, registers, stack in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage)
    }
    parts = re.split(r"Function : (\S+)", code)
    opcodes = {name: sass.histogram(sass.parse(body)) for name, body in zip(parts[1::2], parts[2::2], strict=True)}
    return {name: Kernel(*needs[name], dict(opcodes[name])) for name in needs}


def cuda_headers() -> str:
    dry_run = run("nvcc", "--dryrun", source("ceilings"), "-o", "a.out")
    return re.search(r'INCLUDES="-I([^"]+)"', dry_run)[1]


@functools.cache
def emulation(stem: str, *flags: str) -> Path:
    """A production source as a library of this machine, its CUDA replaced by the headers of tests/gpu/emulation."""
    path = folder() / f"emulated{len(list(folder().glob('*.so')))}.so"
    run("g++", "-std=c++17", "-O2", "-fno-strict-aliasing", "-fPIC", "-shared", *flags, f"-I{EMULATION}", "-Icsrc",
        "-isystem", cuda_headers(), str(EMULATION / f"{stem}.cpp"), "-o", str(path))  # fmt: skip
    return path


_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
DTYPES, INT8 = {"float32": 0, "bfloat16": 1, "float16": 2}, 3


class Params(ctypes.Structure):
    """PrefixAttentionLaunch of csrc/params/prefix_attention.h."""

    STEM = "prefix_attention"
    _fields_ = [
        *((name, _POINTER) for name in ("q", "k", "v")),
        *((name, _LONG) for name in ("q_stride", "k_stride", "v_stride")),
        ("pages", _POINTER),
        ("page_stride", _LONG),
        ("page_scales", _POINTER),
        *((name, _LONG) for name in ("page_scales_stride", "T", "N", "H", "D", "page_size")),
        *((name, _INT) for name in ("dtype", "page_dtype")),
        *((name, _POINTER) for name in ("queries", "lengths", "page_table")),
        ("table_width", _LONG),
        *((name, _POINTER) for name in ("order", "shared")),
        ("runs", _LONG),
        *((name, _POINTER) for name in ("alone", "positions", "rotary")),
        ("rotary_dims", _LONG),
        ("scale", ctypes.c_float),
        ("threads", _INT),
        ("out", _POINTER),
        *((name, _POINTER) for name in ("part_sums", "part_heads")),
        ("slots", _LONG),
        *((name, _INT) for name in ("page_shift", "run_tiles", "run_blocks", "alone_blocks", "device")),
        ("stream", _POINTER),
    ]

    @classmethod
    def of(cls, *, dtype: str, depth: int, device: Any = None, stream: int = 0, **values: Any) -> Params:
        kind, shift = DTYPES[dtype], values["page_size"].bit_length() - 1
        stored = INT8 if values["page_scales"] else kind
        return cls(dtype=kind, page_dtype=stored, page_shift=shift, **values)


class PageCopy(ctypes.Structure):
    """PageCopyParams of csrc/params/page_copy.h."""

    STEM = "page_copy"
    _fields_ = [
        *((name, _POINTER) for name in ("pages", "scales")),
        *((name, _LONG) for name in ("layers", "n_pages", "page_bytes", "scale_bytes")),
        ("pairs", ctypes.POINTER(_INT)),
        ("count", _LONG),
        ("device", _INT),
        ("stream", _POINTER),
    ]

    @classmethod
    def of(cls, *, pairs: list[tuple[int, int]], device: Any = None, stream: int = 0, **values: Any) -> PageCopy:
        numbers = [number for pair in pairs for number in pair]
        return cls(pairs=(_INT * len(numbers))(*numbers), count=len(pairs), **values)


class Module:
    """Stands for the native module in front of the production adapter."""

    SPLIT = 256

    def __init__(self, launch: Callable[[Params | PageCopy], None]) -> None:
        self.launch = launch

    def page_copy(self, **values: Any) -> None:
        self.launch(PageCopy.of(**values))

    def prefix_attention_slots(self, table_width: int, page_size: int, depth: int) -> int:
        return -(-table_width * page_size // self.SPLIT) + depth

    def prefix_attention_fwd(self, **values: Any) -> None:
        self.launch(Params.of(**values))


@contextmanager
def standing_in(launch: Callable[[Params | PageCopy], None], tensors: list[torch.Tensor]) -> Iterator[None]:
    """The cuda backend takes CPU tensors, noted in `tensors`, and hands its parameters to `launch`."""

    def address(x: torch.Tensor | None) -> int:
        if x is None or not x.numel():
            return 0
        tensors.append(x)
        return x.data_ptr()

    with (
        mock.patch.dict(dispatch.ORDER, cpu=("cuda", "cpu", "eager")),
        mock.patch.object(native, "cuda", lambda: Module(launch)),
        mock.patch.object(torch.cuda, "is_available", lambda: True),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device: (9, 0)),
        mock.patch.object(cuda, "_stream", lambda device: 0),
        mock.patch.object(cuda, "_address", address),
    ):
        yield


_ELSEWHERE = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_int, ctypes.c_int, ctypes.c_void_p,
    ctypes.c_int,
)  # fmt: skip


@contextmanager
def emulated(seed: int = 0, eager: bool = False, libraries: dict[str, str] | None = None) -> Iterator[None]:
    """Calls run on the host emulation; `eager`: its asynchronous copies land at once; `libraries`: builds by stem."""
    with standing_in(lambda p: _call(p, seed, eager, _ELSEWHERE(), libraries or {}), []):
        yield


@dataclass(frozen=True)
class Launch:
    """One launch: its source, the kernel's mangled name, its grid and what it needs besides."""

    stem: str
    kernel: str
    grid: tuple[int, int]
    threads: int
    shared: int
    params: bytes
    tensors: list[torch.Tensor]


@contextmanager
def launches(run: Callable[[Launch], None]) -> Iterator[None]:
    """Every launch that the production launcher makes inside the block goes to `run`."""
    tensors: list[torch.Tensor] = []
    failed: list[BaseException] = []
    stem = ""

    def elsewhere(name: bytes, x: int, y: int, threads: int, shared: int, params: int, size: int) -> None:
        try:
            if not failed:
                copied = ctypes.string_at(params, size)
                run(Launch(stem, name.decode(), (x, y), threads, shared, copied, list(tensors)))
        except BaseException as error:  # C++ lies between here and the caller
            failed.append(error)

    def launch(p: Params | PageCopy) -> None:
        nonlocal stem
        stem = p.STEM
        _call(p, 0, False, _ELSEWHERE(elsewhere), {})
        tensors.clear()
        if failed:
            raise failed.pop()

    with standing_in(launch, tensors):
        yield


def execute_launch(launch: Launch, target: str, **options: Any) -> None:
    """Executes the PTX that the chip would run, or a text `ptx` in its place; other options are those of `execute`."""
    text = options.pop("ptx", None) or ptx_of_kernel(launch.stem, launch.kernel, target)
    execute(text, launch.grid, (launch.threads,), [launch.params], shared_bytes=launch.shared,
            tensors=launch.tensors, entry=launch.kernel, **options)  # fmt: skip


@contextmanager
def executed(target: str, **options: Any) -> Iterator[list[Launch]]:
    """Every launch is executed from its PTX for a chip; yields the list of them. Options are those of `execute`."""
    done: list[Launch] = []

    def run_one(launch: Launch) -> None:
        done.append(launch)
        execute_launch(launch, target, **options)

    with launches(run_one):
        yield done


def _call(p: Params | PageCopy, seed: int, eager: bool, elsewhere: Any, libraries: dict[str, str]) -> None:
    loaded = ctypes.CDLL(libraries.get(p.STEM) or str(emulation(p.STEM)))
    loaded.size_of_params.restype = ctypes.c_int64
    assert loaded.size_of_params() == ctypes.sizeof(p)
    loaded.emulated(ctypes.byref(p), seed, int(eager), elsewhere)


def asan_runtime() -> str:
    return run("g++", "-print-file-name=libasan.so").strip()
