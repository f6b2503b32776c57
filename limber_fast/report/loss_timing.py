"""Time and peak memory of the loss, eager against limber_fast, each point in a process of its own.

A process of its own, because peak memory is a property of a process and an allocator keeps what an earlier point used.
All are forked from one that has imported torch and computed nothing: a point costs no start-up.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

SIZES = (1024, 2048, 4096, 8192, 16384, 32768)
FEATURES = 512
DTYPES = ("bfloat16", "float32")
IMPLEMENTATIONS = ("limber_fast", "eager")
# Eager keeps the logits, two log-softmaxes and, going back, their gradients: about 5 matrices of N x N at the peak.
EAGER_MATRICES = 5
_BYTES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Point:
    """One measurement, forward and backward; `skipped` says why there is none."""

    n: int
    dtype: str
    implementation: str
    seconds: float | None = None
    peak_mib: float | None = None
    skipped: str = ""


def measure(n: int, dtype: str, implementation: str, threads: int, backend: str = "auto") -> dict[str, float]:
    """Best time of one forward + backward over [n, 512] towers, and how far it raised this process's peak memory."""
    import torch
    import torch.nn.functional as F

    from limber_fast import info_nce

    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)

    def towers(rows: int) -> tuple:
        features = torch.randn(2, rows, FEATURES, generator=generator)
        image, text = F.normalize(features, dim=2).to(getattr(torch, dtype)).unbind()
        return image.clone().requires_grad_(), text.clone().requires_grad_(), torch.tensor(20.0, requires_grad=True)

    def eager(image, text, scale):
        logits = (scale.to(image.dtype) * image) @ text.T
        label = torch.arange(len(image))
        return (F.cross_entropy(logits, label) + F.cross_entropy(logits.T, label)) / 2

    def fused(image, text, scale):
        return info_nce(image, text, scale, backend=backend)

    loss = eager if implementation == "eager" else fused
    for _ in range(2):
        loss(*towers(256)).backward()
    inputs = towers(n)
    before = _reset_peak()
    seconds, spent = [], 0.0
    # Small sizes are repeated until the best is steady; a large one is long enough by itself.
    while not seconds or (spent < 0.5 and len(seconds) < 20):
        for tensor in inputs:
            tensor.grad = None
        start = time.perf_counter()
        loss(*inputs).backward()
        seconds.append(time.perf_counter() - start)
        spent += seconds[-1]
    return {"seconds": min(seconds), "peak_mib": max(0.0, _peak_mib() - before)}


def sweep(threads: int, budget_seconds: float, backend: str = "auto") -> Iterator[Point]:
    """Every size, dtype and implementation, small sizes first.

    What would not fit in memory, or in the time left, is skipped with the reason.
    """
    end = time.monotonic() + budget_seconds
    took: dict[tuple[str, str], tuple[int, float]] = {}
    for n in SIZES:
        for dtype in DTYPES:
            for implementation in IMPLEMENTATIONS:
                point = Point(n, dtype, implementation)
                reason = _no_room(point) or _no_time(took.get((dtype, implementation)), n, end - time.monotonic())
                if reason:
                    yield Point(**{**asdict(point), "skipped": reason})
                    continue
                point = _in_process(point, threads, backend)
                if point.seconds is not None:
                    took[dtype, implementation] = (n, point.seconds)
                yield point


def _no_room(point: Point) -> str:
    available = _available_bytes()
    need = EAGER_MATRICES * point.n**2 * _BYTES[point.dtype]
    if point.implementation != "eager" or available is None or need < 0.8 * available:
        return ""
    return f"needs about {need / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are free"


def _no_time(earlier: tuple[int, float] | None, n: int, left: float) -> str:
    predicted = 0.0 if earlier is None else earlier[1] * (n / earlier[0]) ** 2
    return f"would take about {predicted:.0f} s, {max(left, 0):.0f} s are left" if predicted > left else ""


def _in_process(point: Point, threads: int, backend: str) -> Point:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    receive, send = context.Pipe(duplex=False)
    process = context.Process(
        target=_send, args=(send, point.n, point.dtype, point.implementation, threads, backend), daemon=True
    )
    process.start()
    send.close()
    try:
        found = receive.recv()
    except EOFError:  # the process was killed, by want of memory more likely than not
        found = None
    process.join()
    found = found or {"skipped": f"failed: exit code {process.exitcode}"}
    return Point(**{**asdict(point), **found})


def _send(result: Connection, *arguments) -> None:
    try:
        result.send(measure(*arguments))
    except KeyboardInterrupt:  # the demo's own words say so
        pass
    except Exception as error:
        words = str(error).strip().splitlines() or [type(error).__name__]
        result.send({"skipped": f"failed: {words[-1].strip()}"})


def _reset_peak() -> float:
    """Forget the peak so far where the kernel allows it, and return the memory in use, MiB."""
    # Where it does not, the peak of the warm-up stands, which is below that of any size worth a chart.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _peak_mib()


def _peak_mib() -> float:
    read: Callable[[], str] = Path("/proc/self/status").read_text
    try:
        return next(int(line.split()[1]) / 1024 for line in read().splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 1024)


def _available_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), None)
