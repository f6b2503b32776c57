"""The builds that info_nce's launchers ask for on each target, recorded from them, and the work of each launch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product

import torch

from limber_fast.kernels import info_nce_bwd_launch, info_nce_launch
from limber_fast.kernels.catalogue import Case, Work
from limber_fast.kernels.info_nce_configs import choose
from limber_fast.kernels.recording import Launch, recording

# Sizes that between them ask for every height of strips, and for bands that add to what others have merged.
N, OTHER_SIZES = 8192, (128, 2500, 4096, 32768)
SMS = {"sm_80": 108, "sm_89": 142, "sm_90": 132, "sm_100": 148}
STEP_N, STEP_D = 32768, (512, 768, 1024)
TARGETS = tuple(SMS)
ARITHMETIC = {
    "bf16": (torch.bfloat16, "ieee"), "fp16": (torch.float16, "ieee"), "tf32": (torch.float32, "tf32"),
    "fp32": (torch.float32, "ieee"),
}  # fmt: skip
_PRODUCTS = ("info_nce_fwd_kernel", "info_nce_redo_kernel", "info_nce_sigmoid_kernel", "info_nce_ds_kernel",
             "info_nce_dual_kernel")  # fmt: skip


@dataclass(frozen=True)
class Options:
    """A call of info_nce whose kernels differ from the plain one's."""

    name: str
    D: int = 512
    labels: bool = False
    ids: bool = False
    extra: int = 0
    smoothing: float = 0.0
    normalize: bool = False
    sigmoid: bool = False
    symmetric: bool = True
    stats: bool = False
    arithmetic: tuple[str, ...] = field(default=("bf16", "tf32", "fp32"))


_ALL = tuple(ARITHMETIC)
OPTIONS = (
    Options("plain", arithmetic=_ALL),
    Options("wide", D=1024, arithmetic=("bf16",)),
    Options("ragged", D=123, arithmetic=_ALL),
    Options("rectangular", labels=True, symmetric=False),
    Options("permuted", labels=True, arithmetic=("bf16", "fp16")),
    Options("normalize", normalize=True, arithmetic=_ALL),
    Options("normalize_permuted", normalize=True, labels=True, arithmetic=("bf16",)),
    Options("ids", ids=True, arithmetic=_ALL),
    Options("extra", extra=1000, arithmetic=("bf16", "fp16")),
    Options("smoothing", smoothing=0.1, arithmetic=("bf16",)),
    Options("statistics", stats=True, arithmetic=("bf16",)),
    Options("sigmoid", sigmoid=True, symmetric=False, arithmetic=_ALL),
    Options("sigmoid_ids", ids=True, sigmoid=True, symmetric=False),
    Options("sigmoid_normalize", normalize=True, sigmoid=True, symmetric=False, arithmetic=("bf16",)),
    Options("everything", labels=True, ids=True, extra=1000, smoothing=0.1, normalize=True, stats=True,
            arithmetic=_ALL),
    Options("sigmoid_everything", labels=True, ids=True, extra=1000, normalize=True, sigmoid=True, symmetric=False,
            stats=True, arithmetic=("bf16",)),
)  # fmt: skip


def launches(target: str, options: Options, arithmetic: str, rows: int = N) -> list[Launch]:
    """What one forward and one backward pass over rows x rows pairs launch."""
    dtype, precision = ARITHMETIC[arithmetic]
    capability = int(target[3:-1]), int(target[-1])
    index = torch.arange(rows, dtype=torch.int32)
    scale = torch.ones(())
    image, text = (torch.empty(rows, options.D, dtype=dtype) for _ in range(2))
    extra = torch.empty(options.extra, options.D, dtype=dtype) if options.extra else None
    call = info_nce_launch.Call(
        image=image, text=text, extra=extra, scale=scale, bias=scale.clone(), labels=index if options.labels else None,
        image_ids=index if options.ids else None, text_ids=index.clone() if options.ids else None,
        label_smoothing=options.smoothing, normalize=options.normalize, sigmoid=options.sigmoid,
        columns=options.symmetric, programs=2 * SMS[target], sms=SMS[target], precision=precision,
        config=choose(capability, dtype, precision, info_nce_launch.tma_can_read(image, text, extra)),
    )  # fmt: skip
    gradient = torch.ones(rows)
    with recording() as found:
        row, col, _, _ = info_nce_launch.info_nce_fwd(call, options.stats)
        info_nce_bwd_launch.info_nce_bwd(call, row, col, gradient, gradient if options.symmetric else None,
                                         need_image=True, need_text=True, need_extra=options.extra > 0)  # fmt: skip
    return found


@lru_cache
def cases(target: str) -> list[tuple[Case, Work]]:
    """Every build once, under the first option set that asks for it."""
    return list(_distinct(target)) if target in TARGETS else []


def steps(target: str) -> dict[str, list[tuple[Case, Work]]]:
    """Every launch of a forward and a backward pass on the tensor cores, in order, by the size of the problem."""
    found = {}
    for d in STEP_D if target in TARGETS else ():
        plain = launches(target, Options("step", D=d), "bf16", STEP_N)
        found[f"info_nce N={STEP_N} D={d} bf16"] = [
            (one.case(one.kernel.__name__, one.kernel.__name__ in _PRODUCTS), work(one, "bf16")) for one in plain
        ]
    return found


def _distinct(target: str) -> Iterator[tuple[Case, Work]]:
    seen = set()
    for rows, options in product((N, *OTHER_SIZES), OPTIONS):
        for arithmetic in options.arithmetic:
            for launch in launches(target, options, arithmetic, rows):
                kernel = launch.kernel.__name__
                # IEEE products of fp32 run on the FMA pipe.
                case = launch.case(kernel, kernel in _PRODUCTS and arithmetic != "fp32")
                if case.build not in seen:
                    seen.add(case.build)
                    yield replace(case, name=_name(case, launch, options, arithmetic)), work(launch, arithmetic)


def _name(case: Case, launch: Launch, options: Options, arithmetic: str) -> str:
    """kernel/options-arithmetic, the tile and warps, and what else tells builds of one call apart."""
    a, c = launch.arguments, launch.constants
    parts = [f"{case.name}/{options.name}-{arithmetic}"]
    blocks = [str(c[key]) for key in ("BLOCK_M", "BLOCK_N", "BLOCK_D", "BLOCK_K", "BLOCK") if key in c]
    parts.append(f"{'x'.join(blocks)}w{case.num_warps}")
    flags = {"SEPARATE": "separate", "HAS_COLUMN": "columns", "FIRST": "first",
             "FIRST_IMAGE": "first_image", "FIRST_TEXT": "first_text"}  # fmt: skip
    parts += [f"strips{c.get('STRIP')}"] * (c.get("STRIP", 1) > 1)
    parts += [word for flag, word in flags.items() if c.get(flag)]
    parts += ["negatives"] * (options.extra > 0 and c.get("HAS_POSITIVE") is False)
    parts += [f"{key}=1" for key in a if key not in case.signature]  # specialised to a build of its own
    return "-".join(parts)


def work(launch: Launch, arithmetic: str) -> Work:
    """Lower bounds of one launch."""
    a, c = launch.arguments, launch.constants
    kernel, programs = launch.kernel.__name__, launch.grid[0]
    if kernel == "info_nce_dual_kernel":
        return _products(a, c, programs, arithmetic)
    if kernel in _PRODUCTS:
        size = a["image"].element_size()
        tiles, steps = a["num_m"] * a["num_n"], -(-a["D"] // c["BLOCK_K"])
        rows, columns = a["num_m"] * c["BLOCK_M"], a["num_n"] * c["BLOCK_N"]
        strip = c.get("STRIP", 1)
        strips = -(-a["num_m"] // strip) * a["num_n"]
        written = 12 * (a["num_n"] * rows + strips * c["BLOCK_N"])
        if kernel == "info_nce_ds_kernel":
            written = rows * columns * size
        flops, outermost = 2.0 * rows * columns * steps * c["BLOCK_K"], -(-strips // programs)
        walk = outermost * strip
        trips = walk * steps
        if kernel == "info_nce_redo_kernel" or c.get("SEPARATE"):
            # Normally none: the flags are read, or the log-sum-exps.
            flops, trips, walk, outermost, written = 0.0, 1, 1, 1, strips
        return Work(
            f"N={rows} M={columns} D={a['D']}", flops, (rows + columns) * a["D"] * size * (flops > 0) + written,
            tiles * (c["BLOCK_M"] + c["BLOCK_N"]) * a["D"] * size * (flops > 0), programs, trips, arithmetic, walk,
            outermost if strip > 1 else 1, max(1.0, walk * programs / tiles) if flops else 1.0,
        )  # fmt: skip
    if kernel == "info_nce_merge_kernel":
        return Work(f"parts={a['parts']} n={a['n']}", 0.0, 12.0 * (a["parts"] + 1) * a["n"], 0.0, programs, a["parts"])
    if kernel == "info_nce_finish_kernel":
        return Work(f"n={a['n']}", 0.0, 32.0 * a["n"], 0.0, programs)
    if kernel == "info_nce_weights_kernel":
        return Work(f"n={a['n']}", 0.0, 16.0 * a["n"], 0.0, programs)
    size = a["x"].element_size()
    moved = a["n"] * a["D"] * (size if kernel == "info_nce_norm_kernel" else 4 + size)
    return Work(f"n={a['n']} D={a['D']}", 0.0, moved, 0.0, programs, -(-a["D"] // c["BLOCK_D"]))


def _products(a: dict, c: dict, programs: int, arithmetic: str) -> Work:
    size, d = a["g"].element_size(), a["D"]
    rows, columns = a["num_rows"], a["num_columns"]
    wide = a["num_d"] * c["BLOCK_D"]
    flops = 2.0 * rows * columns * wide * ((a["image_items"] > 0) + (a["text_items"] > 0))
    depth = columns if a["image_items"] else rows
    moved = rows * columns * size + (rows + columns) * d * (size + 8)
    l2 = programs * (c["BLOCK_M"] + c["BLOCK_D"]) * depth * size
    shape = f"G {rows}x{columns} D={d}"
    return Work(shape, flops, moved, l2, programs, -(-depth // c["BLOCK_K"]), arithmetic)
