"""What this machine can do at most, measured in the run that is held against it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from limber_fast import native
from limber_fast.dispatch import BackendUnavailable

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Ceilings:
    """FLOP/s and bytes/s of all threads together; every figure is the best of several short runs. `facts` are of the
    start; on the CPU `peak` and `bandwidth` measure anew, for a second or less.

    Args:
        threads: as many threads as the benchmarks run on.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._isa_peaks = {isa: self._registers(isa) for isa in native.available_isas()}
        self.read_bytes_per_s = self._read_memory() if self._isa_peaks else 0.0
        self.torch_gemm = {kind: _gemm("cpu", dtype, 2048) for kind, dtype in _DTYPES.items()}

    def peak(self, device: str, isa: str, dtype: str) -> tuple[str, float]:
        """Name and FLOP/s of the ceiling of a product of `dtype` by the kernels of `isa`."""
        kind = {"bfloat16": "bf16", "int8": "int8"}.get(dtype, "fp32")
        if device == "cuda":
            return f"torch GEMM {kind} on CUDA", self._cuda_gemm[kind]
        peaks = self._registers(isa)
        # Intel without AMX: dot products of bf16 are slower than multiply-adds of the same numbers in fp32.
        if kind != "fp32" and peaks[kind] > (peaks["fp32"] if kind == "bf16" else 0):
            return f"{isa} {kind} dot products", peaks[kind]
        if isa == "amx" and peaks["bf16"] > 6 * peaks["fp32"]:
            return "amx bf16 dot products, six for one of fp32", peaks["bf16"] / 6
        return f"{isa} fp32 multiply-adds", peaks["fp32"]

    def bandwidth(self, device: str) -> tuple[str, float]:
        """Name and bytes/s of the ceiling of a row that reads and writes more than it computes."""
        if device == "cuda":
            return "reading device memory", self._cuda_read_bytes_per_s
        return "reading memory", self._read_memory()

    def facts(self) -> dict[str, Any]:
        return {
            "threads": self.threads,
            "read_bytes_per_s": self.read_bytes_per_s,
            "torch_gemm_flop_per_s": self.torch_gemm,
            "peak_flop_per_s": {
                isa: {kind: rate or None for kind, rate in peaks.items()} for isa, peaks in self._isa_peaks.items()
            },
        }

    def _registers(self, isa: str) -> dict[str, float]:
        module = import_module(f"limber_fast._cpu_{isa}")
        runs = [module.cpu_peaks(self.threads) for _ in range(10)]  # one is over in milliseconds
        best = (self.threads * max(figures) for figures in zip(*runs, strict=True))
        return dict(zip(("fp32", "bf16", "int8"), best, strict=True))

    def _read_memory(self) -> float:
        return native.cpu().read_bandwidth(self.threads)

    @cached_property
    def _cuda_gemm(self) -> dict[str, float]:
        return {kind: _gemm("cuda", dtype, 8192) for kind, dtype in _DTYPES.items()}

    @cached_property
    def _cuda_read_bytes_per_s(self) -> float:
        return _read("cuda", 2 << 30)  # 17 times the largest L2


def _read(device: str, size: int) -> float:
    """Bytes/s of reading `size` bytes: by our own kernel where it is built for the device, else by torch's sum."""
    words = torch.ones(size // 4, dtype=torch.int32, device=device)
    total, read = words.new_empty((), dtype=torch.int64), lambda: torch.sum(words, 0, out=total)
    if device == "cuda":
        with suppress(BackendUnavailable):
            total, read = _own_read(words)
    launches, best = 4, float("inf")  # of a single one the wait for its end would be a twentieth
    for _ in range(4):
        start = time.perf_counter()
        for _ in range(launches):
            read()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    if total.sum() != len(words):
        raise AssertionError(f"reading memory: {len(words)} words of 1 add up to {total.sum()}")
    return launches * 4 * len(words) / best


def _own_read(words: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """Where `read_words` leaves its sums, and the call."""
    read_words, device = native.cuda().read_words, words.device.index
    blocks = 8 * torch.cuda.get_device_properties(device).multi_processor_count  # of 256 threads: all that are resident
    partials = words.new_empty(blocks)
    stream = torch.cuda.current_stream().cuda_stream
    size = 4 * len(words)
    return partials, lambda: read_words(words.data_ptr(), size, partials.data_ptr(), blocks, device, stream)


def _gemm(device: str, dtype: torch.dtype, size: int) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
