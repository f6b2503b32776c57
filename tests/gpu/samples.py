"""Small kernels that the tools are tried on: sound ones, and for each check one that it must refuse."""

from __future__ import annotations

from functools import partial

import triton
import triton.language as tl

from limber_fast.kernels.catalogue import Case

TILE = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}


@triton.jit
def _twice(x):
    return x * 2


@triton.jit
def nested_kernel(x, out, n, BLOCK: tl.constexpr):
    """Calls a device function of its own and some of Triton's library, which call others."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + rows, mask=rows < n, other=0.0)
    result = _twice(value) - tl.max(value, 0) + tl.cdiv(n, BLOCK) + tl.zeros((BLOCK,), tl.float32)
    tl.store(out + rows, result, mask=rows < n)


@triton.jit
def matmul_kernel(
    a, b, c, M, N, K, stride_a, stride_b, stride_c,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr = True,
):  # fmt: skip
    """c[M, N] = a[M, K] b[N, K].T. Without WIDE the row offsets are 32 bits wide, which the gate refuses."""
    first_row, first_column = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    rows, columns = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    if WIDE:
        rows, columns = rows.to(tl.int64), columns.to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    a_tile, b_tile = a + rows[:, None] * stride_a + k[None, :], b + columns[None, :] * stride_b + k[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        left = tl.load(a_tile + start, mask=(rows[:, None] < M) & (start + k[None, :] < K), other=0.0)
        right = tl.load(b_tile + start, mask=(columns[None, :] < N) & (start + k[:, None] < K), other=0.0)
        sums = tl.dot(left, right, sums)
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(c + rows[:, None] * stride_c + columns[None, :], sums.to(c.dtype.element_ty), mask=inside)


@triton.jit
def descriptor_matmul_kernel(
    a, b, c, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ON_HOST: tl.constexpr
):
    """The same with tensor descriptors, made on the host or here."""
    if not ON_HOST:
        a = tl.make_tensor_descriptor(a, [M, K], [K, 1], [BLOCK_M, BLOCK_K])
        b = tl.make_tensor_descriptor(b, [N, K], [K, 1], [BLOCK_N, BLOCK_K])
        c = tl.make_tensor_descriptor(c, [M, N], [N, 1], [BLOCK_M, BLOCK_N])
    row, column = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        sums = tl.dot(a.load([row, start]), b.load([column, start]).T, sums)
    c.store([row, column], sums.to(tl.bfloat16))


@triton.jit
def overlapping_store_kernel(x, out, M, N, STEP: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr = False):
    """Rows of `out` by descriptor, stored or added; a STEP below BLOCK writes some from two programs."""
    source = tl.make_tensor_descriptor(x, [M, N], [N, 1], [BLOCK, BLOCK])
    target = tl.make_tensor_descriptor(out, [M, N], [N, 1], [BLOCK, BLOCK])
    row = tl.program_id(0) * STEP
    if ADD:
        target.atomic_add([row, 0], source.load([row, 0]))
    else:
        target.store([row, 0], source.load([row, 0]))


@triton.jit
def copy_kernel(x, out, n, BLOCK: tl.constexpr, LOAD_MASK: tl.constexpr, STORE_MASK: tl.constexpr):
    """Copies n elements; without a mask the last block reads or writes past them."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n) if LOAD_MASK else tl.load(x + i)
    tl.store(out + i, value, mask=i < n if STORE_MASK else None)


@triton.jit
def columns_kernel(x, out, stride, N, BLOCK: tl.constexpr):
    """Copies N columns of a row whose next is `stride` elements on."""
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    tl.store(out + row * stride + column, tl.load(x + row * stride + column, mask=column < N), mask=column < N)


@triton.jit
def sum_kernel(x, out, n, BLOCK: tl.constexpr, ATOMIC: tl.constexpr):
    """Adds all of x into out[0]; without the atomic, programs overwrite each other's sums."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.sum(tl.load(x + i, mask=i < n, other=0.0), 0)
    if ATOMIC:
        tl.atomic_add(out, total)
    else:
        tl.store(out, tl.load(out) + total)


@triton.jit
def neighbour_kernel(x):
    """Every program reads what its neighbour writes."""
    i = tl.program_id(0)
    tl.store(x + i, tl.load(x + i + 1) + 1)


def matmul(name: str = "matmul", *, num_warps: int = 8, num_stages: int = 3, wide: bool = True, **tile: int) -> Case:
    """A build of matmul_kernel in bf16."""
    return Case(
        matmul_kernel, name, {**dict.fromkeys("abc", "*bf16"), **dict.fromkeys(_SIZES, "i32")},
        {**TILE, **tile, "WIDE": wide}, num_warps, num_stages, ("a", "b", "c", *_SIZES[2:]), tensor_core=True,
    )  # fmt: skip


def descriptor_matmul(name: str = "descriptor_matmul", *, on_host: bool = True) -> Case:
    """A build of descriptor_matmul_kernel in bf16: copies by the tensor memory accelerator from sm_90 on."""
    rows, outputs = "tensordesc<bf16[128, 64]>", "tensordesc<bf16[128, 128]>"
    pointers = {"a": rows, "b": rows, "c": outputs} if on_host else dict.fromkeys("abc", "*bf16")
    return Case(
        descriptor_matmul_kernel, name, {**pointers, **dict.fromkeys("MNK", "i32")}, {**TILE, "ON_HOST": on_host},
        num_warps=4, num_stages=3, divisible=("M", "N", "K") if on_host else tuple("abcMNK"), tensor_core=True,
    )  # fmt: skip


_SIZES = ("M", "N", "K", "stride_a", "stride_b", "stride_c")
oversized = partial(matmul, "oversized", BLOCK_N=256, BLOCK_K=128, num_stages=4)
spilling = partial(matmul, "spilling", BLOCK_N=256, num_warps=4)
narrow = partial(matmul, "narrow", wide=False)


def sum_case(name: str = "sum") -> Case:
    """A build of sum_kernel: memory and nothing else."""
    return Case(sum_kernel, name, {"x": "*fp32", "out": "*fp32", "n": "i32"}, {"BLOCK": 1024, "ATOMIC": True})
