"""Every broken contract is one clear error: op, argument, contract, found, remedy."""

from __future__ import annotations

import pytest
import torch

from limber_fast import BackendUnavailable, PagedBatch, prefix_attention, rotary_table

ROWS, PAGES, BATCH = torch.randn(3, 3, 2, 64), torch.zeros(4, 2, 2, 8, 64), PagedBatch([2, 1], [2, 9], [[0], [1, 2]])
CALL = {"q": ROWS[0], "k": ROWS[1], "v": ROWS[2], "pages": PAGES, "batch": BATCH, "rotary": rotary_table(20)}

BAD_VALUES = {
    "q of other T": (dict(q=ROWS[0, :2]), r"q must be \[T, H, D\] with the T = 3 new tokens of batch; got shape \(2, "),
    "k of other H": (dict(k=ROWS[1, :, :1]), r"k must have the shape of q, \(3, 2, 64\); got shape \(3, 1, 64\)"),
    "v without heads": (dict(v=ROWS[2].flatten(1)), r"v must be \[T, H, D\] with the T = 3 .*; got shape \(3, 128\)"),
    "q on meta": (dict(q=ROWS[0].to("meta")), r"q must hold data; got a tensor on meta"),
    "trained k": (
        dict(k=ROWS[1].clone().requires_grad_()),
        r"k must be frozen; got a tensor that requires grad; call under torch.no_grad\(\), or train with torch.nn.func",
    ),
    "pages of other D": (
        dict(pages=PAGES[..., :32]),
        r"pages must be \[n_pages, H, 2, page size, D\] with \(2, 2, 8, 64\) after the first, as q and batch have it; "
        r"got shape \(4, 2, 2, 8, 32\)",
    ),
    "pages with gaps": (
        dict(pages=torch.zeros(4, 2, 2, 8, 128)[..., :64]),
        r"pages must have contiguous pages; got strides .*; it is written in place",
    ),
    "too few pages": (dict(pages=PAGES[:2]), r"pages must have page 2, which batch names; got 2 pages"),
    "rotary too short": (
        dict(rotary=rotary_table(8)),
        r"rotary must have a row for position 8; got shape \(8, 64\); the context is longer than the table",
    ),
    "rotary too wide": (dict(rotary=rotary_table(20, 66)), r"rotary must be .* an even R of at most D = 64; got shape"),
    "scale of 0": (dict(scale=0.0), r"scale must be positive; got 0.0"),
    "unknown backend": (dict(backend="tpu"), r"backend must be one of 'auto', .* got 'tpu'"),
}
BAD_KINDS = {
    "q of numbers": (dict(q=[1.0]), r"q must be a tensor \[T, H, D\]; got list"),
    "integer v": (dict(v=ROWS[2].long()), r"v must be fp16, bf16, fp32 or fp64; got torch.int64"),
    "k of other dtype": (dict(k=ROWS[1].half()), r"k must have the dtype of q, torch.float32; got torch.float16"),
    "pages of other dtype": (
        dict(pages=PAGES.half()), r"pages must have the dtype of q, torch.float32, or be int8; got torch.float16; make",
    ),
    "a plain batch": (
        dict(batch=[0, 1]),
        r"batch must be a PagedBatch; got list; make one: limber_fast.PagedBatch, or PagePool.batch",
    ),
    "rotary of other dtype": (dict(rotary=rotary_table(20).double()), r"rotary must be fp32; got torch.float64; make"),
    "scale of a string": (dict(scale="1"), r"scale must be a number; got str"),
}
BAD_BATCHES = {
    "more new than there are": (([3], [2], [[0]]), r"queries must lie between 0 and the sequence's length; got 3 of 2"),
    "negative": (([-1], [2], [[0]]), r"queries must lie between 0 and the sequence's length; got -1 of 2 in seq"),
    "too few pages": (([1], [9], [[0]]), r"page_tables must hold all tokens, 8 a page; got 1 pages for 9 tokens in"),
    "negative page": (([1], [9], [[0, -1]]), r"page_tables must hold page numbers; got -1 in sequence 0"),
    "one missing": (([1, 1], [9], [[0, 1]]), r"queries, lengths and page_tables must have one entry per sequence; go"),
}


@pytest.mark.parametrize("change, message", BAD_VALUES.values(), ids=BAD_VALUES)
def test_values_and_shapes(change, message):
    with pytest.raises(ValueError, match="^prefix_attention: " + message):
        prefix_attention(**(CALL | change))


@pytest.mark.parametrize("change, message", BAD_KINDS.values(), ids=BAD_KINDS)
def test_dtypes_and_kinds(change, message):
    with pytest.raises(TypeError, match="^prefix_attention: " + message):
        prefix_attention(**(CALL | change))


@pytest.mark.parametrize("arguments, message", BAD_BATCHES.values(), ids=BAD_BATCHES)
def test_batches(arguments, message):
    with pytest.raises(ValueError, match="^PagedBatch: " + message):
        PagedBatch(*arguments)


def test_positions_of_a_batch():
    with pytest.raises(ValueError, match=r"^PagedBatch: positions must have one number per new token, 2; got 1 of th"):
        PagedBatch([2], [2], [[0]], positions=[0])
    with pytest.raises(ValueError, match=r"^PagedBatch: positions must not be negative; got -1"):
        PagedBatch([2], [2], [[0]], positions=[0, -1])


def test_what_needs_grad_is_fine_where_nothing_is_trained():
    with torch.no_grad():
        prefix_attention(**(CALL | {"k": ROWS[1].clone().requires_grad_()}))


def test_named_backend_never_falls_back():
    for name in ("triton", "cuda"):
        with pytest.raises(BackendUnavailable, match=f"prefix_attention: backend '{name}' cannot run this call"):
            prefix_attention(**CALL, backend=name)


def test_vmap_is_refused():
    with pytest.raises(RuntimeError, match=r"^prefix_attention: torch.vmap is not supported; a batch has sequences of"):
        torch.vmap(lambda q: prefix_attention(**(CALL | {"q": q})))(ROWS)
