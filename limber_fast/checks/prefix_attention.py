"""What prefix_attention and its batches ask of their arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from limber_fast.checks.general import (
    dense,
    floating,
    has_data,
    invalid,
    kind_of,
    real,
    same_device,
    same_dtype,
    shape_of,
)


def positive(op: str, name: str, value: Any) -> None:
    real(op, name, value)
    if not value > 0:
        raise invalid(op, name, "be positive", repr(value))


def paged_batch(op: str, batch: Any, kind: type) -> None:
    if not isinstance(batch, kind):
        remedy = "make one: limber_fast.PagedBatch, or PagePool.batch"
        raise invalid(op, "batch", "be a PagedBatch", kind_of(batch), remedy, kind=TypeError)


def attention_operands(op: str, q: Any, k: Any, v: Any, batch: Any) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        dense(op, name, x, "[T, H, D]")
        floating(op, name, x)
        if x.ndim != 3 or x.shape[0] != batch.tokens or 0 in x.shape[1:]:
            raise invalid(op, name, f"be [T, H, D] with the T = {batch.tokens} new tokens of batch", shape_of(x))
        if x.shape != q.shape:
            raise invalid(op, name, f"have the shape of q, {tuple(q.shape)}", shape_of(x))
        has_data(op, name, x)
        same_dtype(op, name, x, "q", q)
        same_device(op, name, x, "q", q)
        if torch.is_grad_enabled() and x.requires_grad:
            remedy = "call under torch.no_grad(), or train with torch.nn.functional.scaled_dot_product_attention"
            raise invalid(op, name, "be frozen", "a tensor that requires grad", remedy)
    same_device(op, "batch", batch.lengths, "q", q)


def key_value_pages(op: str, pages: Any, page_scales: Any, q: Tensor, batch: Any) -> None:
    expected = (q.shape[1], 2, batch.page_size, q.shape[2])
    _pages(op, "pages", pages, "[n_pages, H, 2, page size, D]", expected, q, batch)
    if pages.dtype != torch.int8:
        if pages.dtype != q.dtype:
            contract = f"have the dtype of q, {q.dtype}, or be int8"
            raise invalid(op, "pages", contract, kind_of(pages), "make them: PagePool", kind=TypeError)
        if page_scales is not None:
            raise invalid(op, "page_scales", "be None unless pages are int8", kind_of(pages), kind=TypeError)
        return
    if page_scales is None:
        raise invalid(op, "page_scales", "be given with int8 pages", "None", "PagePool.layer_scales has them")
    _pages(op, "page_scales", page_scales, "[n_pages, H, 2, page size]", expected[:3], q, batch)
    if page_scales.dtype != torch.float32:
        raise invalid(op, "page_scales", "be fp32", kind_of(page_scales), kind=TypeError)


def _pages(op: str, name: str, x: Any, shape: str, expected: tuple[int, ...], q: Tensor, batch: Any) -> None:
    dense(op, name, x, shape)
    if x.ndim != len(expected) + 1 or x.shape[1:] != expected:
        contract = f"be {shape} with {expected} after the first, as q and batch have it"
        raise invalid(op, name, contract, shape_of(x))
    if not x[0:1].is_contiguous():
        raise invalid(op, name, "have contiguous pages", f"strides {x.stride()}", "it is written in place")
    same_device(op, name, x, "q", q)
    if batch.highest_page >= x.shape[0]:
        raise invalid(op, name, f"have page {batch.highest_page}, which batch names", f"{x.shape[0]} pages")


def rotary_angles(op: str, rotary: Any, q: Tensor, batch: Any) -> None:
    dense(op, "rotary", rotary, "[positions, R]")
    if rotary.dtype != torch.float32:
        raise invalid(op, "rotary", "be fp32", kind_of(rotary), "make it: limber_fast.rotary_table", kind=TypeError)
    if rotary.ndim != 2 or rotary.shape[1] % 2 or not 0 < rotary.shape[1] <= q.shape[2] or not rotary.is_contiguous():
        contract = f"be [positions, R], contiguous, with an even R of at most D = {q.shape[2]}"
        raise invalid(op, "rotary", contract, shape_of(rotary))
    if batch.highest_position >= rotary.shape[0]:
        contract = f"have a row for position {batch.highest_position}"
        raise invalid(op, "rotary", contract, shape_of(rotary), "the context is longer than the table")
    same_device(op, "rotary", rotary, "q", q)


def paged_sequences(
    op: str, queries: Sequence[int], lengths: Sequence[int], tables: Sequence[Any], page_size: int
) -> None:
    if not isinstance(page_size, int) or page_size < 1:
        raise invalid(op, "page_size", "be a positive integer", repr(page_size))
    if not len(queries) == len(lengths) == len(tables):
        found = f"{len(queries)}, {len(lengths)} and {len(tables)}"
        raise invalid(op, "queries, lengths and page_tables", "have one entry per sequence", found)
    for n, (new, length, table) in enumerate(zip(queries, lengths, tables, strict=True)):
        if not 0 <= new <= length:
            contract = "lie between 0 and the sequence's length"
            raise invalid(op, "queries", contract, f"{new} of {length} in sequence {n}")
        if len(table) * page_size < length:
            contract = f"hold all tokens, {page_size} a page"
            raise invalid(op, "page_tables", contract, f"{len(table)} pages for {length} tokens in sequence {n}")
        if min(table, default=0) < 0:
            raise invalid(op, "page_tables", "hold page numbers", f"{min(table)} in sequence {n}")


def token_positions(op: str, positions: Sequence[int], tokens: int) -> None:
    if len(positions) != tokens:
        raise invalid(op, "positions", f"have one number per new token, {tokens}", f"{len(positions)} of them")
    if min(positions, default=0) < 0:
        raise invalid(op, "positions", "not be negative", str(min(positions)))
