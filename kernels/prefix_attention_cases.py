"""The builds that prefix_attention's launchers ask for on each target, recorded from them, and each launch's work."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from limber_fast.kernels import prefix_attention_launch
from limber_fast.kernels.catalogue import TARGETS, Case, Work
from limber_fast.kernels.recording import Launch, recording

_PRECISION = {"bf16": (torch.bfloat16, "ieee"), "fp16": (torch.float16, "ieee"), "tf32": (torch.float32, "tf32"),
              "fp32": (torch.float32, "ieee")}  # fmt: skip
_HALF = ("bf16", "fp16")
_ATTEND = ("prefix_attention_shared_kernel", "prefix_attention_alone_kernel")


@dataclass(frozen=True)
class Options:
    """A step of N sequences that bring `new` tokens each, behind `prefix` tokens that all share and `own` of theirs."""

    name: str
    N: int = 32
    new: int = 1
    prefix: int = 800
    own: int = 64
    H: int = 16
    D: int = 256
    page: int = 8
    rotary: int = 64
    positions: bool = False
    int8: bool = False  # keys and values in the pages
    arithmetic: tuple[str, ...] = ("bf16", "fp16", "tf32", "fp32")

    @property
    def length(self) -> int:
        return self.prefix + self.own + self.new


OPTIONS = (
    Options("decode"),
    Options("prefill", N=1, new=2048, prefix=0, own=0),
    # All block sizes with and without splits, in either kernel.
    Options("questions", new=12),
    Options("forked", N=4, new=64),
    Options("forked_prefill", N=4, new=128),
    Options("heads_of_64", N=4, new=16, prefix=96, own=0, H=12, D=64, rotary=0, arithmetic=("bf16", "fp32")),
    Options("heads_of_80", N=5, new=3, prefix=80, own=100, H=12, D=80, page=5, rotary=20, positions=True,
            arithmetic=("fp16", "fp32")),
    Options("heads_of_208", N=20, new=20, D=208, arithmetic=("bf16", "fp32")),
    Options("decode_int8", int8=True, arithmetic=_HALF),
    Options("prefill_int8", N=1, new=2048, prefix=0, own=0, int8=True, arithmetic=_HALF),
    Options("questions_int8", new=12, int8=True, arithmetic=_HALF),
    Options("forked_int8", N=4, new=64, int8=True, arithmetic=_HALF),
    Options("forked_prefill_int8", N=4, new=128, int8=True, arithmetic=_HALF),
    Options("heads_of_80_int8", N=5, new=3, prefix=80, own=100, H=12, D=80, page=5, rotary=20, positions=True,
            int8=True, arithmetic=_HALF),
)  # fmt: skip


def launches(options: Options, arithmetic: str) -> list[Launch]:
    """What one call launches."""
    dtype, precision = _PRECISION[arithmetic]
    n, t, width = options.N, options.N * options.new, -(-options.length // options.page)

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    def rows() -> torch.Tensor:
        return torch.empty(t, 3, options.H, options.D, dtype=dtype)[:, 0]  # of a fused product

    run = (0, n, 0, options.prefix, 0) if options.prefix else ()
    page = (4, options.H, 2, options.page)
    with recording() as found:
        prefix_attention_launch.prefix_attention_fwd(
            rows(), rows(), rows(), torch.empty(*page, options.D, dtype=torch.int8 if options.int8 else dtype),
            torch.empty(page) if options.int8 else None,
            ints(*range(0, t + 1, options.new)), ints(*[options.length] * n), ints(*[0] * (n * width)).view(n, width),
            ints(*range(n)), ints(*run).view(-1, 5), ints(*[options.prefix] * n), len(run) // 5,
            ints(*[0] * t) if options.positions else None,
            torch.empty(2048, options.rotary) if options.rotary else None,
            torch.empty(t, options.H, options.D, dtype=dtype), scale=options.D**-0.5, precision=precision,
        )  # fmt: skip
    return found


def cases(target: str) -> list[tuple[Case, Work]]:
    """Every build once, under the first option set that asks for it."""
    return list(_distinct(target)) if target in TARGETS else []


def _distinct(target: str) -> Iterator[tuple[Case, Work]]:
    seen = set()
    for options in OPTIONS:
        for arithmetic in options.arithmetic:
            for case, work in _priced(target, options, arithmetic):
                if case.build not in seen:
                    seen.add(case.build)
                    yield case, work


def steps(target: str) -> dict[str, list[tuple[Case, Work]]]:
    """One layer's attention of a decode step in bf16: 32 sequences that share 800 tokens."""
    plain = OPTIONS[0]
    name = f"prefix_attention N={plain.N} prefix={plain.prefix} own={plain.own} H={plain.H} D={plain.D}"
    return {name: _priced(target, plain, "bf16")}


def _priced(target: str, options: Options, arithmetic: str) -> list[tuple[Case, Work]]:
    return [
        (launch.case(f"{launch.kernel.__name__}/{options.name}-{arithmetic}",
                     _on_tensor_cores(target, launch, arithmetic)),
         work(launch, options, arithmetic))
        for launch in launches(options, arithmetic)
    ]  # fmt: skip


def _on_tensor_cores(target: str, launch: Launch, arithmetic: str) -> bool:
    """By the chip's own instructions: those of sm_90 and later take 64 rows, fewer are multiplied by sm_80's."""
    if launch.kernel.__name__ not in _ATTEND or arithmetic == "fp32":
        return False
    return int(target[3:]) < 90 or launch.constants["BLOCK_M"] >= 64


def work(launch: Launch, options: Options, arithmetic: str) -> Work:
    """Lower bounds of one launch."""
    kernel, c, o = launch.kernel.__name__, launch.constants, options
    t, size = o.N * o.new, _PRECISION[arithmetic][0].itemsize
    programs = math.prod(launch.grid)
    shape = f"N={o.N} new={o.new} prefix={o.prefix} own={o.own} H={o.H} D={o.D}"
    if kernel == "prefix_attention_starts_kernel":
        return Work(shape, 0.0, 16.0 * o.N, 16.0 * o.N, programs, -(-o.N // c["BLOCK"]), arithmetic)
    if kernel not in _ATTEND:
        slots = launch.arguments.get("slots", 0)  # of the merge; the append reads q, k and v and writes as many
        appended = 4.0 * size + 2.0 * _held(o, size)
        moved = t * o.H * o.D * (appended if kernel == "prefix_attention_append_kernel" else 4.0 * slots + size)
        return Work(shape, 0.0, moved, moved, programs, max(1, slots), arithmetic)
    shared = kernel == "prefix_attention_shared_kernel"
    tokens = o.prefix if shared else o.own + o.new
    row_tiles = -(-t // c["BLOCK_M"]) if shared else o.N * -(-o.new // c["BLOCK_M"])
    # Causal: of new tokens a row sees half on average.
    seen = tokens if shared else o.own + (o.new + 1) / 2
    keys = 2.0 * tokens * o.H * o.D * _held(o, size) * (1 if shared else o.N)
    split = c["SPLIT"] or tokens
    parts = t * o.H * (-(-tokens // split)) * (4.0 * o.D + 8.0)
    blocks = -(-min(split, tokens) // c["BLOCK_N"])
    return Work(
        shape, 4.0 * row_tiles * c["BLOCK_M"] * o.H * seen * c["BLOCK_D"], keys + t * o.H * o.D * size + parts,
        2.0 * row_tiles * o.H * seen * o.D * _held(o, size) + parts, programs, max(1, blocks), arithmetic,
    )  # fmt: skip


def _held(options: Options, size: int) -> float:
    """Bytes of a number in the pages, its part of the scale included."""
    return 1.0 + 4.0 / options.D if options.int8 else float(size)
