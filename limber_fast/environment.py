"""What `limber-fast env` reports: versions, CPU, threads, devices, and the backend every op would take and why."""

from __future__ import annotations

import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from limber_fast import __version__, dispatch, native
from limber_fast.console import Console

REQUIRED = ("torch", "triton", "numpy", "rich", "safetensors")
OPTIONAL = ("torchvision", "open_clip_torch", "scikit-learn", "matplotlib", "pillow", "pytest-benchmark", "psutil")
PEERS = ("inf-cl", "liger-kernel", "cut-cross-entropy")
OVERRIDES = (
    "LIMBER_FAST_BACKEND", "LIMBER_FAST_AUTOTUNE", native.ISA_VARIABLE, "OMP_NUM_THREADS", "OMP_WAIT_POLICY",
    "CUDA_VISIBLE_DEVICES",
)  # fmt: skip


def collect() -> dict[str, Any]:
    """Everything this machine and installation decide, as JSON types."""
    return {
        "versions": {
            "limber_fast": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in (*REQUIRED, *OPTIONAL, *PEERS)},
        },
        "platform": platform.platform(),
        "python_executable": sys.executable,
        "environment": {name: os.environ[name] for name in OVERRIDES if name in os.environ},
        "cpu": _cpu(),
        "threads": {
            "torch": torch.get_num_threads(),
            "torch_interop": torch.get_num_interop_threads(),
            "usable_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "openmp": openmp_libraries(),
        },
        "cuda": _cuda(),
        "ops": {op: {device: _backend(op, device) for device in dispatch.ORDER} for op in dispatch.OPS},
    }


def render(info: dict[str, Any], console: Console) -> None:
    """Prints what `collect` found as tables."""
    versions = [(name, version or "not installed") for name, version in info["versions"].items()]
    console.table("Versions", (), [*versions, ("platform", info["platform"]), *info["environment"].items()])

    cpu, threads = info["cpu"], info["threads"]
    isas = [(f"kernels {isa}", kernels["reason"] or "available") for isa, kernels in cpu["kernels"].items()]
    rows = [
        ("model", cpu["model"]),
        ("features", " ".join(cpu["features"]) or "unknown"),
        ("kernels in use", cpu["isa"] or cpu["error"]),
        *isas,
        ("threads", f"{threads['torch']} of {threads['usable_cpus']} usable CPUs"),
        ("OpenMP", ", ".join(threads["openmp"]) or "not loaded"),
    ]
    console.table("CPU", (), rows)

    cuda = info["cuda"]
    build, devices = cuda["build"], [(f"device {i}", _device_line(device)) for i, device in enumerate(cuda["devices"])]
    rows = [
        ("torch built for", cuda["torch"] or "no CUDA"),
        ("kernels built by", f"nvcc {build['compiler']} for {build['targets']}" if build else cuda["build_error"]),
        *(devices or [("devices", f"no CUDA device ({cuda['device_error']})")]),
    ]
    console.table("CUDA", (), rows)

    rows = []
    for op, devices in info["ops"].items():
        for device, choice in devices.items():
            rows.append((op, device, choice["backend"] or "none", "chosen" if choice["backend"] else choice["error"]))
            rows += [(op, device, backend, reason) for backend, reason in choice["refused"].items()]
    console.table("Backends", ("op", "tensors on", "backend", "why"), rows)


def override_error() -> str | None:
    """Why LIMBER_FAST_BACKEND or LIMBER_FAST_CPU_ISA is refused, in one line; None where neither is."""
    try:
        dispatch.preferred("auto")
        if os.environ.get(native.ISA_VARIABLE):
            native.cpu_isa()
    except (ValueError, dispatch.BackendUnavailable) as error:
        return str(error)
    return None


def openmp_libraries() -> list[str]:
    """Paths of the OpenMP runtimes mapped into this process: more than one means more than one thread pool."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:  # not Linux
        return []
    return sorted(set(re.findall(r"/\S*/lib(?:g|i)?omp[^/\s]*\.so[^/\s]*", maps)))


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    report: dict[str, Any] = {"model": _cpu_model(), "features": [], "isa": None, "error": None}
    refusals = {isa: native.isa_refusal(isa) for isa in native.ISA_FEATURES}
    report["kernels"] = {isa: {"available": reason is None, "reason": reason} for isa, reason in refusals.items()}
    try:
        report["features"] = [name for name, present in native.cpu_features().items() if present]
        report["isa"] = native.cpu_isa()
    except dispatch.BackendUnavailable as error:
        report["error"] = str(error)
    return report


def _cpu_model() -> str:
    try:
        names = re.findall(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _cuda() -> dict[str, Any]:
    report: dict[str, Any] = {"torch": torch.version.cuda, "build": None, "build_error": None}
    try:
        module = native.cuda()
    except dispatch.BackendUnavailable as error:
        devices = [_torch_device(index) for index in range(torch.cuda.device_count())]
        return report | {
            "build_error": str(error),
            "devices": devices,
            "device_error": None if devices else "torch sees none",
        }
    build = module.build()
    versions = {part: f"{build[part] // 1000}.{build[part] % 1000 // 10}" for part in ("compiler", "runtime", "driver")}
    report["build"] = versions | {"targets": build["targets"]}
    try:
        devices = [module.device_properties(index) for index in range(module.device_count())]
    except RuntimeError as error:  # the CUDA runtime's own words: no driver, no device
        return report | {"devices": [], "device_error": str(error)}
    return report | {"devices": devices, "device_error": None}


def _torch_device(index: int) -> dict[str, Any]:
    found = torch.cuda.get_device_properties(index)
    return {
        "name": found.name,
        "capability": (found.major, found.minor),
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
    }


def _device_line(device: dict[str, Any]) -> str:
    major, minor = device["capability"]
    memory = f"{device['memory_bytes'] / 2**30:.0f} GiB"
    line = f"{device['name']}, sm_{major}{minor}, {device['multiprocessors']} SMs, {memory}"
    if "clock_khz" not in device:
        return line
    # Two transfers a clock: the data rate of every GPU memory so far.
    bandwidth = 2 * device["memory_clock_khz"] * 1e3 * device["memory_bus_bits"] / 8
    return f"{line}, {device['clock_khz'] / 1e6:.2f} GHz, {bandwidth / 1e9:.0f} GB/s nominal"


def _backend(op: str, device: str) -> dict[str, Any]:
    try:
        chosen, refused = dispatch.explain(op, device)
    except (dispatch.BackendUnavailable, ValueError) as error:  # LIMBER_FAST_BACKEND cannot be met, or names none
        return {"backend": None, "refused": {}, "error": str(error)}
    return {"backend": chosen, "refused": refused, "error": None}
