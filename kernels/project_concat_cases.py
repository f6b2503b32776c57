"""The builds that project_concat's launchers ask for on each target, recorded from them, and each launch's work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from limber_fast.kernels import project_concat_launch
from limber_fast.kernels.catalogue import TARGETS, Case, Work
from limber_fast.kernels.recording import Launch, recording

# A batch of LiMBeR's with CLIP RN50x16 in front of GPT-J: B images of k soft prompts, then TEXT tokens.
B, K, TEXT, VOCABULARY = 64, 144, 32, 50400
PROGRAMS = 264
ARITHMETIC = {
    "bf16": (torch.bfloat16, "ieee"), "fp16": (torch.float16, "ieee"), "tf32": (torch.float32, "tf32"),
    "fp32": (torch.float32, "ieee"),
}  # fmt: skip
# The dimension that each product adds up.
_DEPTH = {
    "project_concat_fwd_kernel": "D", "project_concat_weight_kernel": "rows", "project_concat_features_kernel": "E",
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """A call of project_concat whose kernels differ from the plain one's.

    dropout: the threshold; from 2^31 on its type is another.
    embedding: dtype of the word embedding where it is not the features'; int8 comes with scales.
    needs: what the backward pass is asked for besides the norm's weight and bias: features, weight, bias.
    """

    name: str
    D: int = 3072
    E: int = 4096
    padding: int = 0  # elements between rows of the features
    bias: bool = True
    embedding: torch.dtype | None = None
    dropout: int = 0
    norm: bool = False
    affine: bool = True
    needs: str = "fwb"
    arithmetic: tuple[str, ...] = ("bf16", "fp16", "tf32", "fp32")


OPTIONS = (
    Options("plain"),
    Options("ragged", D=123, E=75, dropout=2**30),
    Options("strided", padding=8, arithmetic=("bf16", "fp32")),
    Options("no_bias", bias=False, needs="w"),
    Options("bias_alone", needs="b", dropout=2**30),
    Options("int8", embedding=torch.int8),
    Options("half_embedding", embedding=torch.float16, arithmetic=("bf16", "tf32", "fp32")),
    Options("fp32_embedding", embedding=torch.float32, arithmetic=("bf16", "fp16")),
    Options("dropout", dropout=2**30),
    Options("norm", norm=True),
    Options("norm_dropout", norm=True, dropout=2**30),
    Options("plain_norm", norm=True, affine=False, bias=False),
    Options("everything", D=123, E=75, padding=5, embedding=torch.int8, dropout=2**31, norm=True),
)


def launches(target: str, options: Options, arithmetic: str) -> list[Launch]:
    """What one forward and one backward pass launch."""
    dtype, precision = ARITHMETIC[arithmetic]
    capability = int(target[3:-1]), int(target[-1])
    rows, e = B * K, options.E
    features = torch.empty(rows, options.D + options.padding, dtype=dtype)[:, : options.D]
    weight = torch.empty(e, options.D, dtype=dtype)
    aligned = all(x.stride(0) * x.element_size() % 16 == 0 for x in (features, weight))
    embedding = torch.empty(VOCABULARY, e, dtype=options.embedding or dtype)
    p = project_concat_launch.Projection(
        features=features, weight=weight, bias=torch.empty(e, dtype=dtype) if options.bias else None, seed=1,
        threshold=options.dropout, factor=2**32 / (2**32 - options.dropout),
        config=project_concat_launch.choose(capability, dtype, precision, aligned), precision=precision,
    )  # fmt: skip
    tokens = torch.empty(B, K + TEXT, dtype=torch.int64)
    out, grad = (torch.empty(tokens.numel(), e, dtype=dtype) for _ in range(2))
    positions = torch.arange(rows)
    ln_weight, ln_bias = (torch.empty(e) if options.affine else None for _ in range(2))
    with recording() as found:
        project_concat_launch.project(
            p, out, positions, input_ids=tokens, image_token_id=VOCABULARY, embedding=embedding,
            scales=torch.empty(VOCABULARY) if options.embedding == torch.int8 else None,
        )  # fmt: skip
        if options.norm:
            project_concat_launch.normalise(out, positions, ln_weight, ln_bias, 1e-5)
            grad, _, _ = project_concat_launch.through_norm(
                p, grad, positions, ln_weight, 1e-5, PROGRAMS, parts=options.affine
            )
        project_concat_launch.gradients(
            p, grad, positions, not options.norm, need_features="f" in options.needs, need_weight="w" in options.needs,
            need_bias="b" in options.needs and options.bias,
        )  # fmt: skip
    return found


def cases(target: str) -> list[tuple[Case, Work]]:
    """Every build once, under the first option set that asks for it."""
    return list(_distinct(target)) if target in TARGETS else []


def _distinct(target: str) -> Iterator[tuple[Case, Work]]:
    seen = set()
    for options in OPTIONS:
        for arithmetic in options.arithmetic:
            for launch in launches(target, options, arithmetic):
                kernel = launch.kernel.__name__
                # IEEE products of fp32 run on the FMA pipe.
                products = _has_product(launch) and arithmetic != "fp32"
                again = "_again" if launch.constants.get("HAS_TEXT") is False else ""  # the backward's, below a norm
                case = launch.case(f"{kernel}/{options.name}{again}-{arithmetic}", products)
                if case.build not in seen:
                    seen.add(case.build)
                    yield case, work(launch, arithmetic)


def _has_product(launch: Launch) -> bool:
    """The norm has none, nor a gradient of the bias alone."""
    return launch.kernel.__name__ in _DEPTH and launch.constants.get("HAS_WEIGHT", True)


def work(launch: Launch, arithmetic: str) -> Work:
    """Lower bounds of one launch."""
    a, c = launch.arguments, launch.constants
    kernel, programs, e = launch.kernel.__name__, launch.grid[0], a["E"]
    if kernel in _DEPTH:
        return _product(launch, programs, arithmetic)
    # A program reads its row three times and writes it; backward four times, and its gradient twice.
    if kernel == "project_concat_norm_kernel":
        rows, size, touched, passes = a["positions"].numel(), a["out"].element_size(), 2, 4
    else:
        rows, size, touched, passes = a["rows"], a["prompts"].element_size(), 3, 7
    return Work(
        f"rows={rows} E={e}", 0.0, touched * rows * e * size, passes * rows * e * size, programs, -(-e // c["BLOCK"]),
        arithmetic, -(-rows // programs),
    )  # fmt: skip


def _product(launch: Launch, programs: int, arithmetic: str) -> Work:
    a, c = launch.arguments, launch.constants
    rows, d, e, kernel = a["rows"], a["D"], a["E"], launch.kernel.__name__
    size = a["weight" if "weight" in a else "features"].element_size()
    depth = {"D": d, "rows": rows, "E": e}[_DEPTH[kernel]]
    tiles, steps = a["num_m"] * a["num_n"], -(-depth // c["BLOCK_K"])
    flops = 2.0 * tiles * c["BLOCK_M"] * c["BLOCK_N"] * steps * c["BLOCK_K"]
    l2 = tiles * (c["BLOCK_M"] + c["BLOCK_N"]) * depth * size
    moved = (rows * d + e * d + rows * e) * size
    if kernel == "project_concat_fwd_kernel" and c["HAS_TEXT"]:
        moved += B * TEXT * e * (a["embedding"].element_size() + size)
    if not _has_product(launch):
        flops, l2, moved = 0.0, rows * e * size, rows * e * size
    return Work(f"rows={rows} D={d} E={e}", flops, moved, l2, programs, steps, arithmetic)
