"""One row of a benchmark: the result is checked, then the op and its baselines are timed in turns in one process."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from limber_fast.backends.triton import tuning

SHORT_DTYPE = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
MAX_ROUNDS = 100
# What packages raise for a dtype, shape or device that they do not take, or where a part of theirs is missing.
_REFUSALS = (AttributeError, ImportError, OSError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Trial:
    """A workload with its tensors in memory.

    Args:
        ours: the op, forward and backward.
        baselines: the same computation by others; 'eager' is plain PyTorch as a careful engineer writes it.
        errors: relative errors of a result against a float64 reference, by name of the output.
        tolerance: the largest error of `ours`.
        baseline_tolerance: the largest error of a baseline: only a different formula may exceed it, not its rounding.
        flops: floating-point operations that `ours` executes.
        bytes: what it must at least read and write: inputs and outputs.
        skipped: baselines that do not run here, with the reason.
        bound: 'flops' or 'bytes', the ceiling that the row is held against.
        arithmetic: of the products, where it is not the row's dtype: 'int8'.
        weights: bytes of the weights by name, '' for ours: what memory holds beside the peak of a call.
    """

    ours: Callable[[], Any]
    baselines: dict[str, Callable[[], Any]]
    errors: Callable[[Any], dict[str, float]]
    tolerance: float
    baseline_tolerance: float
    flops: float
    bytes: float
    skipped: dict[str, str] = field(default_factory=dict)
    bound: str = "flops"
    arithmetic: str = ""
    weights: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Workload:
    """A row as the table names it; `prepare` makes the tensors when its turn comes.

    Args:
        group: rows of one sweep: 'size', 'width', ...
        shape: dimension letters and sizes.
        cost: operations, for the progress bar alone.
        isa: the CPU kernels to use; '' for the choice of `limber_fast.native`.
        options: what else tells rows apart, such as cache_mb.
        fewest_rounds: however long a round takes.
        stem: of a row that is no op: the op whose backend its time is.
    """

    op: str
    group: str
    shape: dict[str, int]
    dtype: str
    cost: float
    prepare: Callable[[Workload], Trial]
    device: str = "cpu"
    isa: str = ""
    options: dict[str, float] = field(default_factory=dict)
    fewest_rounds: int = 3
    stem: str = ""

    @property
    def name(self) -> str:
        sizes = "-".join(f"{letter}{size}" for letter, size in self.shape.items())
        extra = [self.isa, "" if self.device == "cpu" else self.device, *(f"{k}{v:g}" for k, v in self.options.items())]
        return "-".join([sizes, SHORT_DTYPE[self.dtype], *filter(None, extra)])

    @property
    def id(self) -> str:
        return f"{self.op}/{self.group}/{self.name}"

    def identity(self) -> dict[str, Any]:
        """What is known before anything runs; skipped and failed rows consist of it."""
        return {"id": self.id, "op": self.op, "group": self.group, "shape": self.shape, "dtype": self.dtype,
                "device": self.device, "isa": self.isa or None, **self.options}  # fmt: skip


def measure(
    trial: Trial, device: str, benchmark: Any, budget: float, fewest_rounds: int, peak: Callable[[], float] | None
) -> dict[str, Any]:
    """Checks, then times `trial` under pytest-benchmark's `benchmark`, for about `budget` seconds.

    The first call of each at this shape is the cold one; it also gives the peak memory (beyond the inputs, gradients
    included). Then every baseline is run in pairs with ours, a pair of each in a round: drift of the machine hits both
    alike, and the ratio is the median over pairs of baseline time / our time. Of a pair each follows the other:
    baselines one after the other find each other's code and data warm. Right before each of our runs that takes
    0.1 s or more `peak`, FLOP/s, is measured, for the clock drifts over the seconds that such rows take.

    Returns: columns of the row; nothing but the error where pytest-benchmark is disabled.
    Raises: AssertionError where a result is wrong, before anything is reported.
    """
    functions = {"": trial.ours, **trial.baselines}
    if device == "cuda" and tuning.asked():
        trial.ours()  # what it times once for this problem is neither its time nor its memory
    cold: dict[str, tuple[float, int | None]] = {}
    worst: dict[str, float] = {}
    for name, function in functions.items():
        result, *cold[name] = _first_call(function, device)
        limit = trial.baseline_tolerance if name else trial.tolerance
        worst[name] = _check(name or "limber_fast", trial.errors(result), limit)
        del result
    columns: dict[str, Any] = {"error": worst[""]}
    if benchmark.disabled:
        benchmark.pedantic(trial.ours)
        return columns

    seconds: dict[str, list[float]] = {name: [] for name in trial.baselines}
    turn = cycle(trial.baselines)
    peaks: list[float] = []

    def before_ours() -> None:
        if name := next(turn, None):
            seconds[name].append(_timed(trial.baselines[name], device)[1])
        if peak and times[""] >= 0.1:
            peaks.append(peak())

    pairs = max(1, len(seconds))
    times = {name: first for name, (first, _) in cold.items()}
    if sum(times.values()) < budget:  # the caches' and allocators' warm-up; a long first call has done it by itself
        times = {name: _timed(function, device)[1] for name, function in functions.items()}
    rounds = max(fewest_rounds, min(MAX_ROUNDS, int(budget / (sum(times.values()) + (pairs - 1) * times[""]))))
    benchmark.pedantic(_synchronised(trial.ours, device), setup=before_ours, rounds=rounds * pairs)

    ours = benchmark.stats.stats.data
    columns |= {"rounds": rounds, "flops": trial.flops, "bytes": trial.bytes, "warm_s": statistics.median(ours),
                "best_s": min(ours), "cold_s": cold[""][0], "peak_bytes": cold[""][1],
                "flop_per_s": trial.flops / statistics.median(ours)}  # fmt: skip
    if peaks:
        fractions = (trial.flops / run / rate for run, rate in zip(ours, peaks, strict=True))
        columns |= {"ceiling_fraction": statistics.median(fractions), "ceiling_flop_per_s": max(peaks)}
    for first, (name, theirs) in enumerate(seconds.items()):
        beside = ours[first::pairs]
        columns |= {
            f"{name}_ratio": statistics.median(a / b for a, b in zip(theirs, beside, strict=True)),
            f"{name}_ratio_of_best": min(theirs) / min(beside),
            f"{name}_warm_s": statistics.median(theirs),
            f"{name}_cold_s": cold[name][0],
            f"{name}_peak_bytes": cold[name][1],
            f"{name}_error": worst[name],
        }
    columns |= {f"{name}_weights_bytes".lstrip("_"): size for name, size in trial.weights.items()}
    return columns | {f"{name}_skipped": reason for name, reason in trial.skipped.items()}


def trace(function: Callable[[], Any], device: str, path: Path) -> None:
    """One call under torch.profiler, written for chrome://tracing or Perfetto."""
    activities = torch.profiler.ProfilerActivity
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile(activities=[activities.CPU, *[activities.CUDA] * (device == "cuda")]) as profiler:
        _timed(function, device)
    profiler.export_chrome_trace(str(path))


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for the shapes of one row: compiled afresh, as after some rows it would give up and run eagerly."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def add_peer(
    name: str, make: Callable[[], Callable[[], Any]], baselines: dict[str, Callable[[], Any]], skipped: dict[str, str]
) -> None:
    """Puts the call that `make` returns, of a package that it imports, among `baselines`; into `skipped` the reason,
    where the package is not installed or refuses the call. To know, it is made once: its cold time is of the second.
    """
    try:
        call = make()
        call()
    except ModuleNotFoundError as missing:
        skipped[name] = f"{missing.name} is not installed"
    except _REFUSALS as refusal:
        skipped[name] = " ".join(str(refusal).split()) or type(refusal).__name__
    else:
        baselines[name] = call


def available_bytes(device: str) -> int | None:
    """Memory that a new allocation may take, None where the system does not say."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return _proc("meminfo", "MemAvailable")


def _check(name: str, errors: dict[str, float], limit: float) -> float:
    wrong = [f"{output} {error:.1e}" for output, error in errors.items() if not error <= limit]  # NaN is wrong
    if wrong:
        raise AssertionError(f"wrong result of {name}: relative error of {', '.join(wrong)}; allowed {limit:.0e}")
    return max(errors.values())


def _synchronised(function: Callable[[], Any], device: str) -> Callable[[], Any]:
    if device != "cuda":
        return function

    def run() -> Any:
        result = function()
        torch.cuda.synchronize()
        return result

    return run


def _timed(function: Callable[[], Any], device: str) -> tuple[Any, float]:
    function = _synchronised(function, device)
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def _first_call(function: Callable[[], Any], device: str) -> tuple[Any, float, int | None]:
    """Result, seconds, and how far the call raised the memory in use."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result, seconds = _timed(function, device)
        return result, seconds, torch.cuda.max_memory_allocated() - before
    known = _reset_peak()
    before = _proc("self/status", "VmRSS")
    result, seconds = _timed(function, device)
    peak = _proc("self/status", "VmHWM")
    return result, seconds, max(0, peak - before) if known and peak and before else None


def _reset_peak() -> bool:
    """Give free heap back, so that reusing it counts as growth, and forget the peak; False where that is impossible."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except (AttributeError, OSError):  # not glibc, not Linux, or not allowed
        return False
    return True


def _proc(file: str, key: str) -> int | None:
    try:
        lines = Path("/proc", file).read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), None)
