"""The builds that int8_linear's launchers ask for on each target, recorded from them, and each launch's work."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from limber_fast.kernels import int8_linear_launch
from limber_fast.kernels.catalogue import TARGETS, Case, Work
from limber_fast.kernels.recording import Launch, recording

PROGRAMS = 264
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# The dimension that each product adds up.
DEPTH = {"int8_linear_fwd_kernel": "K", "int8_linear_bwd_kernel": "N"}
_FP32_PIECES = 3  # bf16 products that one of fp32 activations takes


def weight_of(n: int, k: int, target: str) -> int8_linear_launch.Weight:
    return int8_linear_launch.Weight(
        torch.empty(n, -(-k // 64) * 64, dtype=torch.int8), torch.empty(n), torch.empty(n, dtype=torch.int32), k,
        (int(target[3:-1]), int(target[-1])), PROGRAMS,
    )  # fmt: skip


@dataclass(frozen=True)
class Options:
    """A call of int8_linear whose kernels differ from the plain one's.

    Args: padding: elements between rows of x, residual and the gradient. kept: the argument of gelu_new, for backward.
    """

    name: str
    M: int = 2048
    N: int = 28672  # q|k|v|fc_in of GPT-J
    K: int = 4096
    padding: int = 0
    w8a8: bool = False
    bias: bool = False
    gelu: bool = False
    residual: bool = False
    kept: bool = False
    dtypes: tuple[str, ...] = ("bf16", "fp16", "fp32")


_EPILOGUE = {"bias": True, "gelu": True, "kept": True}
_ALL = {**_EPILOGUE, "residual": True}
OPTIONS = (
    Options("plain"),
    Options("decode", M=1),
    Options("some", M=48),
    Options("out", N=4096, K=20480, bias=True, residual=True),
    Options("out_decode", M=4, N=4096, K=20480, bias=True, residual=True),
    Options("gelu", **_EPILOGUE),
    Options("ragged", M=333, N=75, K=123, padding=5, **_ALL),
    Options("ragged_some", M=33, N=75, K=2123, padding=5, **_ALL),
    Options("ragged_decode", M=3, N=75, K=2123, padding=5, **_ALL),
)
OPTIONS += tuple(Options(**{**vars(one), "name": f"w8a8_{one.name}", "w8a8": True}) for one in OPTIONS)


def launches(target: str, options: Options, dtype: str) -> list[Launch]:
    """What one forward and one backward pass launch; forward alone under w8a8, whose backward is w8a16's."""
    m, n, k, kind = options.M, options.N, options.K, DTYPES[dtype]
    weight = weight_of(n, k, target)

    def rows(width: int) -> torch.Tensor:
        return torch.empty(m, width + options.padding, dtype=kind)[:, :width]

    out, kept = (torch.empty(m, n, dtype=kind) for _ in range(2))
    with recording() as found:
        int8_linear_launch.int8_linear_fwd(
            rows(k), weight, torch.empty(n) if options.bias else None, rows(n) if options.residual else None, out,
            kept if options.kept else None, gelu=options.gelu, w8a8=options.w8a8, threshold=6.0,
        )  # fmt: skip
        if not options.w8a8:
            g, factor = int8_linear_launch.fold_scales(rows(n), kept if options.kept else None, weight)
            int8_linear_launch.int8_linear_bwd(g, factor, weight, torch.empty(m, k, dtype=kind))
    return found


def cases(target: str) -> list[tuple[Case, Work]]:
    """Every build once, under the first option set that asks for it."""
    return list(_distinct(target)) if target in TARGETS else []


def steps(target: str) -> dict[str, list[tuple[Case, Work]]]:
    """Layers of GPT-J in bf16: one token, a prompt, and the gradient of its inputs."""
    found = {}
    for name in ("decode", "plain", "w8a8_plain"):
        options = next(one for one in OPTIONS if one.name == name)
        both = [(_case(x, options, "bf16"), work(x, options, "bf16")) for x in launches(target, options, "bf16")]
        forward = [one for one in both if not one[0].name.startswith(("int8_linear_grad", "int8_linear_bwd"))]
        shape = f"M={options.M} N={options.N} K={options.K}"
        found[f"int8_linear {'w8a8' if options.w8a8 else 'w8a16'} {shape}"] = forward
        if name == "plain":
            found[f"int8_linear backward {shape}"] = both[len(forward) :]
    return found


def _case(launch: Launch, options: Options, dtype: str) -> Case:
    kernel = launch.kernel.__name__
    return launch.case(f"{kernel}/{options.name}-{dtype}", kernel in DEPTH)


def _distinct(target: str) -> Iterator[tuple[Case, Work]]:
    seen = set()
    for options in OPTIONS:
        for dtype in options.dtypes:
            for launch in launches(target, options, dtype):
                case = _case(launch, options, dtype)
                if case.build not in seen:
                    seen.add(case.build)
                    yield case, work(launch, options, dtype)


def work(launch: Launch, options: Options, dtype: str, stored: int | None = None, old: int = 0) -> Work:
    """Lower bounds of one launch; stored: bytes of an element of the result, where it is not in `dtype`, old: of one
    that is added to."""
    kernel, a, c = launch.kernel.__name__, launch.arguments, launch.constants
    m, n, k, size = options.M, options.N, options.K, DTYPES[dtype].itemsize
    shape, programs = f"M={m} N={n} K={k}", math.prod(launch.grid)
    if kernel in DEPTH:
        depth, width = (k, n) if DEPTH[kernel] == "K" else (n, k)
        tiles, all_steps = launch.grid[0], -(-depth // c["BLOCK_K"])
        pieces, multiplied = (_FP32_PIECES, "bf16") if dtype == "fp32" else (1, dtype)
        if options.w8a8:
            pieces, multiplied, size = 1, "int8", 1
        flops = 2.0 * pieces * tiles * c["BLOCK_M"] * c["BLOCK_N"] * all_steps * c["BLOCK_K"]
        l2 = tiles * depth * (c["BLOCK_M"] * size + c["BLOCK_N"])
        result = m * width * (4 * launch.grid[1] if c["SPLIT"] else (stored or DTYPES[dtype].itemsize) + old)
        moved, trips = m * depth * size + n * k + result, -(-all_steps // a["splits"])
        return Work(shape, flops, moved, l2, programs, trips, multiplied)
    if kernel == "int8_linear_outliers_kernel":
        moved, trips = 4.0 * k, -(-k // c["BLOCK"])
    elif kernel == "int8_linear_quantize_kernel":
        moved, trips = m * k * (size + 1.0), -(-k // c["BLOCK"])
    elif kernel == "int8_linear_grad_kernel":
        moved, trips = m * n * size * (3.0 if c["HAS_GELU"] else 2.0), -(-n // c["BLOCK"])
    else:  # sums of all splits, and the result
        moved, trips = m * (k if "bwd" in kernel else n) * (4.0 * a["splits"] + (stored or size) + old), a["splits"]
    return Work(shape, 0.0, moved, moved, programs, trips, "fp32")
