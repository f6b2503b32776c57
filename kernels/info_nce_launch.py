"""Launchers of the info_nce kernels, forward, and the call that both passes are told: workspaces and launch order.

Memory beyond inputs, outputs and states: at most WORKSPACE bytes of partial sums, 4 bytes a row for the positives and 4
more with fused normalisation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from limber_fast.kernels import info_nce as forward
from limber_fast.kernels import info_nce_redo, info_nce_sigmoid
from limber_fast.kernels.info_nce_configs import Config, Tiles

WORKSPACE = 64 << 20


def tma_can_read(*towers: Tensor | None) -> bool:
    """Rows and pointers of whole 16 bytes, and no row within another's: a descriptor's stride is at least its width."""
    return all(
        x.stride(0) >= x.shape[1] and x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
        for x in towers
        if x is not None
    )


@dataclass(frozen=True)
class Call:
    """What both passes are told: towers, options and where to run.

    Args:
        image: [N, D], text: [M, D], extra: [K, D] or None: rows of any stride, contiguous in D.
        scale, bias: fp32 tensors with one element.
        labels, image_ids, text_ids: int32 or None.
        programs: how many programs a persistent kernel starts at most. sms: multiprocessors, for the macro-tiles.
        precision: of fp32 products, 'ieee' or 'tf32'.
        kept: fp32, where the norms of all rows stay from the forward to the backward pass; None: each computes them.
    """

    image: Tensor
    text: Tensor
    extra: Tensor | None
    scale: Tensor
    bias: Tensor
    labels: Tensor | None
    image_ids: Tensor | None
    text_ids: Tensor | None
    label_smoothing: float
    normalize: bool
    sigmoid: bool
    columns: bool
    config: Config
    programs: int
    sms: int
    precision: str
    kept: Tensor | None = None

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.image.device)

    def sides(self) -> list[tuple[Tensor, bool]]:
        """The column matrices, each with whether it is the text itself (positives, ids, column sums)."""
        return [(self.text, True)] if self.extra is None else [(self.text, True), (self.extra, False)]

    def flags(self, is_text: bool) -> dict[str, bool]:
        return {
            "HAS_LABELS": is_text and self.labels is not None,
            "HAS_IDS": is_text and self.image_ids is not None,
            "HAS_POSITIVE": is_text,
        }

    def selectors(self) -> dict[str, Tensor]:
        nothing = self.scale  # a pointer that the flags keep from being read
        return {
            "labels": nothing if self.labels is None else self.labels,
            "image_ids": nothing if self.image_ids is None else self.image_ids,
            "text_ids": nothing if self.text_ids is None else self.text_ids,
        }

    def towers(self, columns: Tensor, norms: dict[int, Tensor]) -> dict[str, Tensor | int]:
        image = self.image
        return {
            "image": image, "text": columns, "scale": self.scale,
            "image_norm": norms.get(id(image), self.scale), "text_norm": norms.get(id(columns), self.scale),
            "N": image.shape[0], "M": columns.shape[0], "D": image.shape[1],
            "image_stride": image.stride(0), "text_stride": columns.stride(0),
        }  # fmt: skip

    def product(self, tiles: Tiles) -> dict[str, int | bool | str]:
        """How a tile's dot products are made."""
        return {
            "BLOCK_M": tiles.BLOCK_M, "BLOCK_N": tiles.BLOCK_N, "BLOCK_K": tiles.BLOCK_K, "NORMALIZE": self.normalize,
            "TMA": self.config.tma, "EVEN_K": self.image.shape[1] % tiles.BLOCK_K == 0, "PRECISION": self.precision,
            "STAGES": tiles.stages, "num_warps": tiles.num_warps, "num_stages": tiles.stages,
        }  # fmt: skip

    def forward_tiles(self, extras: bool) -> Tiles:
        config, many = self.config, self.normalize or self.image_ids is not None
        if not self.sigmoid:
            crowded = config.forward_crowded if many else None
            return config.narrow if extras else crowded or config.forward
        if extras or many or self.image.dtype == torch.float32 or config.sigmoid_narrow:
            return replace(config.narrow, num_warps=config.sigmoid_warps or config.narrow.num_warps)
        return replace(config.forward_crowded or config.forward, num_warps=8)

    def ds_tiles(self) -> Tiles:
        if self.label_smoothing > 0 and self.image.dtype != torch.float32:
            return self.config.narrow  # what smoothing keeps beside the accumulator spills at the usual tile
        crowded = self.normalize or self.labels is not None or self.image_ids is not None
        return self.config.ds_crowded if crowded and self.config.ds_crowded else self.config.ds

    def separate_tiles(self) -> Tiles:
        """Of dS's tiles that need two exponentials."""
        span, own = self.ds_tiles(), self.config.separate
        if own is not None and own.BLOCK_M <= span.BLOCK_M and own.BLOCK_N <= span.BLOCK_N:
            return own
        return replace(span, num_warps=8)

    def redo_tiles(self, tiles: Tiles) -> Tiles:
        """Of the forward's tiles that need two exponentials."""
        own = self.config.redo
        if own is not None and own.BLOCK_M == tiles.BLOCK_M and own.BLOCK_N <= tiles.BLOCK_N:
            return own
        return replace(tiles, num_warps=8)

    def warp_groups(self, tiles: Tiles) -> int:
        """Runs of columns of a tile that different warps hold: four warps hold the rows of tensor memory."""
        return tiles.num_warps // 4 if self.config.tensor_memory else 1

    def grid(self, items: int) -> tuple[int]:
        return (max(1, min(items, self.programs)),)

    def norms(self, known: bool = False) -> dict[int, Tensor]:
        """Row norms of each tower; `known`: those that the forward pass has left in `kept`."""
        found: dict[int, Tensor] = {}
        at = 0  # one tensor twice has two places: the backward pass may not know it for one
        for x in (self.image, self.text, self.extra) if self.normalize else ():
            if x is None:
                continue
            n, d = x.shape
            norm = self.new(n) if self.kept is None else self.kept[at : at + n]
            at += triton.cdiv(n, 4) * 4  # builds take pointers of whole 16 bytes
            found[id(x)] = norm
            if self.kept is None or not known:
                forward.info_nce_norm_kernel[(triton.cdiv(n, 32),)](
                    x, norm, n, d, x.stride(0), BLOCK_M=32, BLOCK_D=min(128, triton.next_power_of_2(d))
                )
        return found


# Strips are cut for this many programs, two on each multiprocessor of the chips that have them, however many run: the
# sums have the same bits on any number.
PROGRAMS = 264
STRIPS = (1, 2, 4, 8)  # row blocks


def strips_and_bands(num_m: int, num_n: int, lengths: tuple[int, ...], row: float, column: float) -> tuple[int, int]:
    """Row blocks of a strip and of a band, whose partial sums are within WORKSPACE: the fewest tiles on the busiest
    program, and 0.15 of one more for the column sums of a strip.

    Args:
        row, column: bytes of the partial sums of a row block, and of a strip's columns.
    """

    def plan(strip: int) -> tuple[float, int, int]:
        fitting = max(1, int(WORKSPACE / (row + column / strip)) // strip * strip)
        even = triton.cdiv(num_m, triton.cdiv(num_m, fitting))
        band = min(triton.cdiv(even, strip) * strip, fitting)
        strips = (triton.cdiv(min(band, num_m - block), strip) for block in range(0, num_m, band))
        return sum(triton.cdiv(count * num_n, PROGRAMS) for count in strips) * (strip + 0.15), strip, band

    return min(map(plan, lengths))[1:]


def info_nce_fwd(call: Call, with_stats: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States of rows and columns as ops/info_nce_op.InfoNceState describes them, and the top-1 flags (or empty)."""
    n, m = call.image.shape[0], call.text.shape[0]
    extras = with_stats or call.label_smoothing > 0
    tiles = call.forward_tiles(extras)
    norms, positive = call.norms(), call.new(n)
    fields = 6 if call.label_smoothing > 0 else 4
    row = call.new(fields, n)
    col = call.new(fields, m) if call.columns else torch.zeros(fields, m, device=call.image.device)
    row_extra, col_extra = (call.new(3, k if extras else 0) for k in (n, m if call.columns else 0))
    correct = [torch.zeros(k if with_stats else 0, dtype=torch.uint8, device=call.image.device) for k in (n, m)]

    num_m = triton.cdiv(n, tiles.BLOCK_M)
    blocks = [triton.cdiv(columns.shape[0], tiles.BLOCK_N) for columns, _ in call.sides()]
    parts, width = sum(blocks), blocks[0] * tiles.BLOCK_N
    triple = 24 if extras else 12
    strip, band = strips_and_bands(
        num_m, blocks[0], STRIPS if tiles.kept and not extras else STRIPS[:1],
        triple * parts * tiles.BLOCK_M, triple * width if call.columns else 0,
    )  # fmt: skip
    for block in range(0, num_m, band):
        rows = min(band, num_m - block)
        _band(call, norms, positive, row, col, row_extra, col_extra, block * tiles.BLOCK_M, rows, blocks, extras,
              strip)  # fmt: skip

    def finish(state: Tensor, extra: Tensor, flags: Tensor, columns_of: Tensor | None) -> None:
        size = state.shape[1]
        forward.info_nce_finish_kernel[(triton.cdiv(size, 128),)](
            state, extra if extras else state, positive, positive if columns_of is None else columns_of, call.scale,
            flags if with_stats else state, size, call.label_smoothing, HAS_COLUMN=columns_of is not None,
            HAS_EXTRAS=call.label_smoothing > 0, HAS_STATS=with_stats, SIGMOID=call.sigmoid, BLOCK=128,
        )  # fmt: skip

    finish(row, row_extra, correct[0], None)
    if call.columns:
        inverse = None
        if call.labels is not None:
            inverse = torch.empty_like(call.labels)
            inverse[call.labels.long()] = torch.arange(n, dtype=torch.int32, device=inverse.device)
        finish(col, col_extra, correct[1], inverse)
    return row, col, correct[0], correct[1]


def _band(
    call: Call, norms: dict[int, Tensor], positive: Tensor, row: Tensor, col: Tensor, row_extra: Tensor,
    col_extra: Tensor, row0: int, num_m: int, blocks: list[int], extras: bool, strip: int,
) -> None:  # fmt: skip
    """Rows row0 .. row0 + num_m BLOCK_M - 1 against everything, merged into the running sums."""
    tiles, parts = call.forward_tiles(extras), sum(blocks)
    rows, width = num_m * tiles.BLOCK_M, blocks[0] * tiles.BLOCK_N
    strips = triton.cdiv(num_m, strip)
    row_part, col_part = call.new(parts, 3, rows), call.new(strips, 3, width if call.columns else 0)
    row_more, col_more = (x.new_empty(x.shape if extras else (0,)) for x in (row_part, col_part))
    first = 0
    for (columns, is_text), num_n in zip(call.sides(), blocks, strict=True):
        where = {"row0": row0, "num_m": num_m, "num_n": num_n, "first_part": first}
        common = {**call.towers(columns, norms), **call.selectors(), **call.flags(is_text), **where}
        common["row_part"] = row_part
        product = call.product(tiles)
        grid = call.grid(num_m * num_n)
        if call.sigmoid:
            info_nce_sigmoid.info_nce_sigmoid_kernel[grid](
                **common, bias=call.bias, positive=positive, row_extra=row_more, GROUP=call.config.group,
                HAS_EXTRAS=extras, **product,
            )  # fmt: skip
        else:
            redo = call.new(strips * num_n, dtype=torch.int8)
            side = {"col_part": col_part, "HAS_COLUMNS": call.columns and is_text, "redo": redo, "STRIP": strip}
            # Of 8 row blocks 4 strips: 66 column blocks at once, whose operands L2 holds while strips go down.
            grid, group = call.grid(strips * num_n), max(1, min(call.config.group, 32 // strip))
            forward.info_nce_fwd_kernel[grid](
                **common, **side, positive=positive, row_extra=row_more, col_extra=col_more, GROUP=group,
                HAS_EXTRAS=extras, WIDE=call.image.dtype == torch.float32, PIECES=tiles.pieces,
                KEPT=tiles.kept, LANES=32 if call.config.tensor_memory else 8, WARP_GROUPS=call.warp_groups(tiles),
                **product,
            )  # fmt: skip
            redone = call.redo_tiles(tiles)
            info_nce_redo.info_nce_redo_kernel[grid](
                **common, **side, SPAN_N=tiles.BLOCK_N, WARP_GROUPS=call.warp_groups(redone), **call.product(redone),
            )  # fmt: skip
        first += num_n

    def merge(part: Tensor, more: Tensor, state: Tensor, extra: Tensor, at: int, n: int) -> None:
        forward.info_nce_merge_kernel[(triton.cdiv(n, 128),)](
            part, more, state, extra if extras else state, len(part), part.shape[2], n, at, state.shape[1],
            FIRST=state is row or row0 == 0, HAS_EXTRAS=extras, PLAIN=call.sigmoid, BLOCK=128,
        )  # fmt: skip

    live = min(rows, call.image.shape[0] - row0)
    merge(row_part, row_more, row, row_extra, row0, live)
    if call.columns:
        merge(col_part, col_more, col, col_extra, 0, call.text.shape[0])
