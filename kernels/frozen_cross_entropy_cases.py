"""The builds that frozen_cross_entropy's launchers ask for on each target, recorded from them, and their work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from limber_fast.kernels import frozen_cross_entropy_launch, int8_linear_cases
from limber_fast.kernels.catalogue import TARGETS, Case, Work
from limber_fast.kernels.int8_linear_cases import DTYPES
from limber_fast.kernels.recording import Launch, recording


@dataclass(frozen=True)
class Options:
    """R labelled rows of M; grad: whether the gradient is asked for."""

    name: str
    R: int = 256
    M: int = 2048
    V: int = 50400  # GPT-J's head
    D: int = 4096
    bias: bool = True
    grad: bool = True
    dtypes: tuple[str, ...] = ("bf16", "fp16", "fp32")


OPTIONS = (
    Options("plain"),
    Options("forward", grad=False),
    Options("few", R=4, M=5, bias=False),
    Options("ragged", R=37, M=41, V=601, D=75),
)


def launches(target: str, options: Options, dtype: str) -> list[Launch]:
    """What one forward and one backward pass launch."""
    r, d, kind = options.R, options.D, DTYPES[dtype]
    weight = int8_linear_cases.weight_of(options.V, d, target)
    weight.scales.fill_(1.0)
    losses, gradient = torch.empty(options.M), torch.empty(options.M, d, dtype=kind) if options.grad else None
    labels = torch.zeros(r, dtype=torch.int64)
    with recording() as found:
        frozen_cross_entropy_launch.frozen_cross_entropy_fwd(
            torch.empty(r, d, dtype=kind), weight, torch.empty(options.V) if options.bias else None, labels,
            torch.arange(r), losses, gradient,
        )  # fmt: skip
        if options.grad:
            frozen_cross_entropy_launch.frozen_cross_entropy_bwd(
                losses, gradient, torch.zeros(options.M, dtype=torch.int64), torch.empty_like(gradient),
                ignore_index=-100,
            )  # fmt: skip
    return found


def cases(target: str) -> list[tuple[Case, Work]]:
    """Every build once, under the first option set that asks for it."""
    return list(_distinct(target)) if target in TARGETS else []


def _distinct(target: str) -> Iterator[tuple[Case, Work]]:
    seen, named = set(), Counter()
    for options in OPTIONS:
        for dtype in options.dtypes:
            for launch in launches(target, options, dtype):
                case, done = _priced(launch, options, dtype)
                if case.build not in seen:
                    seen.add(case.build)
                    named[case.name] += 1  # the first chunk, those after it, and a last one of another size
                    count = named[case.name]
                    yield replace(case, name=f"{case.name}-{count}") if count > 1 else case, done


def steps(target: str) -> dict[str, list[tuple[Case, Work]]]:
    """Loss and gradient at GPT-J's head in bf16."""
    plain = OPTIONS[0]
    name = f"frozen_cross_entropy M={plain.M} labelled={plain.R} V={plain.V} D={plain.D}"
    return {name: [_priced(launch, plain, "bf16") for launch in launches(target, plain, "bf16")]}


def _priced(launch: Launch, options: Options, dtype: str) -> tuple[Case, Work]:
    kernel, a, c = launch.kernel.__name__, launch.arguments, launch.constants
    layer = "head_" if kernel.startswith("int8_linear") else ""
    case = launch.case(f"{kernel}/{layer}{options.name}-{dtype}", kernel in int8_linear_cases.DEPTH)
    size, grad = DTYPES[dtype].itemsize, options.grad
    if kernel.startswith("int8_linear"):
        forward = "fwd" in kernel or kernel == "int8_linear_finish_kernel"
        sizes = int8_linear_cases.Options(kernel, M=options.R, N=a.get("N", options.V), K=options.D)
        return case, int8_linear_cases.work(launch, sizes, dtype, stored=4, old=4 if not forward else 0)
    shape = f"M={options.M} labelled={options.R} V={options.V} D={options.D}"
    if kernel == "frozen_cross_entropy_chunk_kernel":
        held = options.R * a["C"]
        moved, l2, width = held * (4.0 + grad * size), held * (8.0 + grad * size), a["padded"]
    elif kernel == "frozen_cross_entropy_finish_kernel":
        moved = l2 = options.R * (36.0 + grad * options.D * (5.0 + size))
        width = options.D if grad else 1
    else:
        moved = l2 = options.M * (12.0 + 2.0 * options.D * size)
        width = options.D
    return case, Work(shape, 0.0, moved, l2, launch.grid[0], -(-width // c["BLOCK"]), "fp32")
