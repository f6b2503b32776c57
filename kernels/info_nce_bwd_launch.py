"""Launchers of the info_nce kernels, backward: macro-tiles, accumulators, launch order.

A macro-tile is a square of dS that both products take; dS is computed for several side by side at a time.

Memory: macro-tiles of dS and spans of blocks within WORKSPACE bytes, 4 bytes a row or column for its weight, and one
fp32 accumulator of the text tower where gradients are 16-bit.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
from torch import Tensor

from limber_fast.kernels import info_nce_bwd as backward
from limber_fast.kernels.info_nce_configs import Tiles
from limber_fast.kernels.info_nce_launch import WORKSPACE, Call

_SMALLEST_MACRO = 2048  # below it a macro-tile is the whole problem


@lru_cache(maxsize=256)
def macro_tiles(
    n: int, m: int, d: int, size: int, accumulator: int, room: int, whole: int, ds: Tiles, dual: Tiles, sms: int
) -> tuple[int, int]:
    """Rows and columns of a macro-tile, and how many of them dS is computed for in one launch: what fits in `room`
    bytes and leaves the fewest multiprocessors idle.

    Counted in steps of the products' depth on the busiest multiprocessor: a tile of dS takes D of them by its share of
    theirs, the products their depth; 53 and 51 more go to what surrounds a tile. At D = 768 a fixed 4096 left them idle
    27% of the time, and 2816 one by one 8% of dS's.
    """
    best = (float("inf"), whole, 1)
    depth = d * ds.BLOCK_M * ds.BLOCK_N / (dual.BLOCK_M * dual.BLOCK_N)
    for side in range(min(_SMALLEST_MACRO, triton.cdiv(max(n, m), whole) * whole), room, whole):
        if side > _SMALLEST_MACRO and side * (side * size + d * accumulator) > room:
            break
        blocks = (side // ds.BLOCK_M) * (side // ds.BLOCK_N)
        items = 2 * side // dual.BLOCK_M * triton.cdiv(d, dual.BLOCK_N)
        for count in range(1, triton.cdiv(m, side) + 1):
            if count > 1 and side * (count * side * size + d * accumulator) > room:
                break
            tiles = triton.cdiv(count * blocks, sms) / count
            steps = tiles * (depth + 53) + triton.cdiv(items, sms) * (side + 51)
            best = min(best, (triton.cdiv(n, side) * triton.cdiv(m, side) * steps, side, count))
        if side >= max(n, m):
            break
    return best[1:]


def info_nce_bwd(
    call: Call, row: Tensor, col: Tensor, row_grad: Tensor, col_grad: Tensor | None, *, need_image: bool,
    need_text: bool, need_extra: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of the towers that are wanted, in the towers' dtype."""
    n, d = call.image.shape
    ds, dual, norms = call.ds_tiles(), call.config.dual, call.norms(known=True)
    grads = [row_grad, *([] if col_grad is None else [col_grad])]
    unit = torch.stack([g.abs().nan_to_num(0.0, 0.0).amax() for g in grads]).amax()
    unit = torch.where(unit > 0, unit, torch.ones_like(unit))
    norms_g, norm_unit = _norms_of_g(call, norms) if norms else ({}, unit)
    direct = call.image.dtype == torch.float32  # the gradient itself accumulates
    acc_stride = d if direct else triton.cdiv(d, 4) * 4  # a descriptor's rows are whole 16 bytes

    wanted = {True: need_text, False: need_extra}
    outputs, sums = [], []
    for columns, is_text in call.sides():
        out = torch.empty_like(columns, memory_format=torch.contiguous_format) if wanted[is_text] else None
        outputs.append(out)
        sums.append(out if direct or out is None else call.new(len(columns), acc_stride))
    d_image = torch.empty_like(call.image, memory_format=torch.contiguous_format) if need_image else None

    whole = max(ds.BLOCK_M, ds.BLOCK_N, dual.BLOCK_M)
    widest = max(columns.shape[0] for columns, _ in call.sides())
    blocks = (triton.cdiv(n, whole) + triton.cdiv(widest, whole)) * (whole // min(ds.BLOCK_M, ds.BLOCK_N))
    room = WORKSPACE - 12 * blocks  # spans
    side, count = macro_tiles(
        n, widest, d, call.image.element_size(), 0 if direct else 4, room, whole, ds, dual, call.sms
    )
    tall, wide = (min(most, triton.cdiv(size, whole) * whole) for most, size in ((side, n), (count * side, widest)))
    g = call.new(tall, wide, dtype=call.image.dtype)
    block = None if direct or not need_image else call.new(tall, acc_stride)
    weights = {} if call.sigmoid else _weights(row, row_grad, unit, ds.BLOCK_M, whole, "row")
    if col_grad is not None:
        weights |= _weights(col, col_grad, unit, ds.BLOCK_N, whole, "col")

    def gradient(acc: Tensor, x: Tensor, out: Tensor, norm: Tensor, norm_g: Tensor) -> None:
        backward.info_nce_gradient_kernel[(triton.cdiv(len(x), 32),)](
            acc, x, norm, norm_g, out, call.scale, unit, norm_unit, len(x), d, x.stride(0), acc_stride,
            NORMALIZE=call.normalize, BLOCK_M=32, BLOCK_D=min(128, triton.next_power_of_2(d)),
        )  # fmt: skip

    for row0 in range(0, n, tall):
        first_image = True
        for (columns, is_text), out in zip(call.sides(), sums, strict=True):
            if d_image is None and out is None:
                continue
            h, num_d = min(tall, triton.cdiv(n - row0, whole) * whole), triton.cdiv(d, dual.BLOCK_N)
            for column0 in range(0, columns.shape[0], side):
                left = triton.cdiv(columns.shape[0] - column0, whole) * whole
                at = column0 % (count * side)
                if at == 0:
                    _fill(call, columns, is_text, norms, norms_g, row, col, row_grad, col_grad, weights, unit,
                          norm_unit, g, row0, column0, h, min(wide, left))  # fmt: skip
                w = min(side, left)
                image_items = 0 if d_image is None else h // dual.BLOCK_M * num_d
                text_items = 0 if out is None else w // dual.BLOCK_M * num_d
                # A role that is not wanted needs a pointer of the accumulators' type all the same.
                image_acc = unit if d_image is None else d_image if direct else block
                backward.info_nce_dual_kernel[(image_items + text_items,)](
                    g[:, at:], call.image, columns, image_acc, unit if out is None else out, n, columns.shape[0], d,
                    call.image.stride(0), columns.stride(0), wide, acc_stride, row0, column0, 0 if direct else row0,
                    n if direct else h, h, w, image_items, text_items, num_d,
                    FIRST_IMAGE=first_image, FIRST_TEXT=row0 == 0, BLOCK_M=dual.BLOCK_M, BLOCK_D=dual.BLOCK_N,
                    BLOCK_K=dual.BLOCK_K, TMA=call.config.tma, PRECISION=call.precision,
                    STAGES=dual.stages, num_warps=dual.num_warps, num_stages=dual.stages,
                )  # fmt: skip
                first_image = False
        if d_image is not None:
            rows = slice(row0, min(row0 + tall, n))
            norm, norm_g = (x[id(call.image)][rows] if x else unit for x in (norms, norms_g))
            gradient(d_image[rows] if direct else block, call.image[rows], d_image[rows], norm, norm_g)
    for (columns, _), out, acc in zip(call.sides(), outputs, sums, strict=True):
        if out is not None:
            gradient(acc, columns, out, norms.get(id(columns), unit), norms_g.get(id(columns), unit))
    return d_image, outputs[0], outputs[1] if len(outputs) > 1 else None


def _norms_of_g(call: Call, norms: dict[int, Tensor]) -> tuple[dict[int, Tensor], Tensor]:
    """What G is divided by for each row, and the unit of their products. Of the powers of two of fp16, whose largest is
    2^15, |G| <= 2 leaves 14 to norms; a row whose norm lies further from the longest counts as long as that one.
    """
    found, narrow = dict(norms), call.image.dtype == torch.float16
    if narrow:
        for key, norm in norms.items():
            top = norm.amax()
            found[key] = torch.where(norm < top * 2.0**-14, top, norm)
    least = [found[id(columns)].amin() for columns, _ in call.sides()]
    return found, found[id(call.image)].amin() * torch.stack(least).amin() * (2.0**14 if narrow else 1.0)


def _weights(state: Tensor, grad: Tensor, unit: Tensor, block: int, whole: int, side: str) -> dict[str, Tensor]:
    """What a tile of dS takes of its rows ('row') or columns ('col'): 4 bytes each and 12 a block, to whole steps."""
    n = state.shape[1]
    blocks = triton.cdiv(n, whole) * (whole // block)
    weight, span = unit.new_empty(blocks * block), unit.new_empty(blocks, 3)
    backward.info_nce_weights_kernel[(blocks,)](state, grad, unit, weight, span, n, BLOCK=block, num_warps=1)
    return {f"{side}_weight": weight, f"{side}_span": span}


def _fill(
    call: Call, columns: Tensor, is_text: bool, norms: dict[int, Tensor], norms_g: dict[int, Tensor], row: Tensor,
    col: Tensor, row_grad: Tensor, col_grad: Tensor | None, weights: dict[str, Tensor], unit: Tensor,
    norm_unit: Tensor, g: Tensor, row0: int, column0: int, h: int, w: int,
) -> None:  # fmt: skip
    """dS of h x w into the workspace: the tiles that one exponential serves, then the others (normally none)."""
    span = call.ds_tiles()
    unused = dict.fromkeys(("row_weight", "row_span", "col_weight", "col_span"), unit)
    for separate in (False,) if call.sigmoid else (False, True):
        tiles = call.separate_tiles() if separate else span
        num_m, num_n = h // tiles.BLOCK_M, w // tiles.BLOCK_N
        backward.info_nce_ds_kernel[call.grid(num_m * num_n)](
            **call.towers(columns, norms), **call.selectors(), **call.flags(is_text), bias=call.bias, row_state=row,
            col_state=col, row_grad=row_grad, col_grad=row_grad if col_grad is None else col_grad, **unused | weights,
            unit=unit, norm_unit=norm_unit, row_norm_g=norms_g.get(id(call.image), unit),
            col_norm_g=norms_g.get(id(columns), unit), g=g, row0=row0, column0=column0, num_m=num_m, num_n=num_n,
            g_stride=g.shape[1], smoothing=call.label_smoothing, GROUP=call.config.group, SPAN_M=span.BLOCK_M,
            SPAN_N=span.BLOCK_N, HAS_COLUMNS=call.columns and is_text, HAS_SMOOTHING=call.label_smoothing > 0,
            SIGMOID=call.sigmoid, SEPARATE=separate, WIDE=call.image.dtype == torch.float32,
            WARP_GROUPS=call.warp_groups(tiles), **call.product(tiles),
        )  # fmt: skip
