"""Kernels the executor is tried on: more Triton kernels than samples.py has, and PTX written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from gpu.ptx import Counts, execute
from limber_fast.kernels.catalogue import Case

TILE = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}
REGISTERS = {"p": "pred", "h": "b16", "r": "b32", "d": "b64"}


def handwritten(body: str, parameters: int = 1, shared: int = 0) -> str:
    """A kernel around `body`: parameters p0, p1, ... of 64 bits, already in %d0, %d1, ...; %r0 is the thread's number.

    Registers are %p, %h (16 bits), %r and %d (64 bits), 64 of each. The static shared array is called `tile`.
    """
    declared = ", ".join(f".param .u64 p{i}" for i in range(parameters))
    registers = "\n".join(f".reg .{kind} %{name}<64>;" for name, kind in REGISTERS.items())
    array = f".shared .align 16 .b8 tile[{shared}];" if shared else ""
    loads = "\n".join(f"ld.param.u64 %d{i}, [p{i}];" for i in range(parameters))
    return f"""
.version 8.8
.target sm_90a
.address_size 64
.visible .entry kernel({declared})
{{
{registers}
{array}
{loads}
mov.u32 %r0, %tid.x;
{body}
ret;
}}
"""


def run_by_hand(
    body: str, tensors: Sequence[torch.Tensor], threads: int = 32, shared: int = 0, **options: Any
) -> Counts:
    """Run `handwritten` with one parameter per tensor, in one block."""
    text = handwritten(body, len(tensors), shared)
    return execute(text, (1,), (threads,), list(tensors), **options)


def evaluate(operation: str, *inputs: Any, out: torch.dtype = torch.float32) -> np.ndarray:
    """One instruction over arrays of 32-bit values: `operation` reads %r1, %r2, ... and writes %r9."""
    columns = [torch.tensor(np.asarray(i)) for i in np.broadcast_arrays(*inputs)]
    result = torch.zeros(columns[0].numel(), dtype=out)
    loads = "".join(f"add.s64 %d2{i}, %d{i}, %d10;\nld.global.b32 %r{i + 1}, [%d2{i}];\n" for i in range(len(columns)))
    address = f"mul.wide.u32 %d10, %r0, 4;\n{loads}"
    store = f"add.s64 %d30, %d{len(columns)}, %d10;\nst.global.b32 [%d30], %r9;"
    threads = columns[0].numel()
    run_by_hand(f"{address}{operation}\n{store}", [*(c.contiguous() for c in columns), result], threads)
    return result.numpy()


def matmul_problem(M: int, N: int, K: int, dtype: torch.dtype) -> tuple[dict[str, object], torch.Tensor]:
    """Arguments of samples.matmul_kernel and the exact product; the output starts as NaN."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, K, generator=generator).to(dtype) for rows in (M, N))
    c = torch.full((M, N), torch.nan, dtype=dtype)
    sizes = {"M": M, "N": N, "K": K, "stride_a": K, "stride_b": K, "stride_c": N}
    return {"a": a, "b": b, "c": c, **sizes}, a.double() @ b.double().T


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@triton.jit
def int8_matmul_kernel(a, b, c, K, stride_a, stride_b, stride_c, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """c[M, N] int32 = a[M, K] b[N, K].T for whole tiles."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, BLOCK_K)
    sums = tl.zeros((BLOCK, BLOCK), tl.int32)
    for start in range(0, K, BLOCK_K):
        left = tl.load(a + rows[:, None] * stride_a + start + k[None, :])
        right = tl.load(b + columns[None, :] * stride_b + start + k[:, None])
        sums = tl.dot(left, right, sums, out_dtype=tl.int32)
    tl.store(c + rows[:, None] * stride_c + columns[None, :], sums)


@triton.jit
def softmax_kernel(x, out, N, stride, BLOCK: tl.constexpr):
    """Softmax of one row per program, in fp32."""
    columns = tl.arange(0, BLOCK)
    row = tl.program_id(0) * stride
    value = tl.load(x + row + columns, mask=columns < N, other=float("-inf")).to(tl.float32)
    weight = tl.exp(value - tl.max(value, 0))
    tl.store(out + row + columns, (weight / tl.sum(weight, 0)).to(out.dtype.element_ty), mask=columns < N)


@triton.jit
def transpose_kernel(x, out, N, BLOCK: tl.constexpr):
    """out = x.T of one tile, by a change of layout through shared memory."""
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (i < N) & (j < N)
    tile = tl.load(x + i * N + j, mask=inside, other=0.0)
    tl.store(out + i * N + j, tl.trans(tile), mask=inside & (j < N))


int8_matmul = Case(
    int8_matmul_kernel, "int8_matmul",
    {"a": "*i8", "b": "*i8", "c": "*i32", **dict.fromkeys(("K", "stride_a", "stride_b", "stride_c"), "i32")},
    {"BLOCK": 64, "BLOCK_K": 64}, divisible=("a", "b", "c", "K", "stride_a", "stride_b", "stride_c"),
)  # fmt: skip
softmax = Case(softmax_kernel, "softmax", {"x": "*bf16", "out": "*fp32", "N": "i32", "stride": "i32"}, {"BLOCK": 512})
transpose = Case(transpose_kernel, "transpose", {"x": "*fp32", "out": "*fp32", "N": "i32"}, {"BLOCK": 64})
