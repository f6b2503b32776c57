"""The interpreter beside the compiler: same process, right numerics, nothing left behind."""

from __future__ import annotations

import itertools

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from gpu import samples
from gpu.interpret import interpreted
from limber_fast.kernels.catalogue import Case
from limber_fast.report.aot import compile_case

NARROW = (torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn)


@triton.jit
def cast_kernel(x, out, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


@triton.jit
def bf16_kernel(x, y, out, n: tl.constexpr):
    i = tl.arange(0, n)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(out + i, tl.where(a > b, a * b - 1.5, tl.maximum(-a, b)) + tl.full((n,), 0.25, tl.bfloat16))


@triton.jit
def choose_kernel(x, out, flag, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(out + i, tl.load(x + i, mask=(i < 5) & (flag == 0), other=-1.0), mask=(flag < 2) & (i < 7))


@triton.jit
def reduce_kernel(x, total, largest, running, n: tl.constexpr):
    i = tl.arange(0, n)
    value = tl.load(x + i)
    tl.store(total, tl.sum(value, 0))
    tl.store(largest, tl.max(value, 0))
    tl.store(running + i, tl.cumsum(value, 0))


@triton.jit
def half_atomic_kernel(x):
    tl.atomic_add(x, tl.load(x))


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_compile_interpret_compile_with_device_functions():
    """The stock interpreter leaves tl.core patched where a kernel calls functions: what compiles next then fails."""
    case = Case(samples.nested_kernel, "nested", {"x": "*fp32", "out": "*fp32", "n": "i32"}, {"BLOCK": 128})
    again = Case(samples.nested_kernel, "again", case.signature, {"BLOCK": 256})
    compile_case(case, "sm_90")
    before = {owner: dict(vars(owner)) for owner in (tl, tl.core, tl.core.tensor)}, set(vars(samples))
    x, out = random(200), torch.full((200,), torch.nan)
    with interpreted():
        samples.nested_kernel[(2,)](x, out, 200, BLOCK=128)
    largest = torch.cat([x[:128].amax().expand(128), x[128:].relu().amax().expand(72)])
    assert torch.equal(out, x * 2 - largest + 2)
    for owner, attributes in before[0].items():
        assert {name for name, value in vars(owner).items() if value is not attributes.get(name)} <= {"__annotations__"}
    assert set(vars(samples)) - before[1] == {"interpreter_semantic"}
    assert compile_case(again, "sm_90").registers > 0


def test_nothing_stays_patched_after_an_error():
    before = JITFunction.run, JITFunction.__call__, triton.knobs.runtime.interpret
    with pytest.raises(ZeroDivisionError), interpreted():
        raise ZeroDivisionError
    assert before == (JITFunction.run, JITFunction.__call__, triton.knobs.runtime.interpret)


def test_a_kernels_own_error_is_not_wrapped():
    x = random(8, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match="no atomics on bf16"), interpreted():
        half_atomic_kernel[(1,)](x)


FLOATS = (torch.float32, torch.float16, *NARROW)
WITH_INTEGERS = [(torch.int32, torch.bfloat16), (torch.bfloat16, torch.int32), (torch.int32, torch.float32)]


@pytest.mark.parametrize(("source", "target"), [*itertools.product(FLOATS, FLOATS), *WITH_INTEGERS])
def test_casts_round_to_nearest_even(source, target):
    x = (8 * random(4096)).to(source)
    out = torch.zeros(4096).to(target)
    with interpreted():
        cast_kernel[(1,)](x, out, 4096)
    assert torch.equal(out.double(), x.double().to(target).double())


@pytest.mark.parametrize("dtype", NARROW)
def test_casts_of_special_values(dtype):
    x = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-30, 1e30, 3.0])
    out = torch.zeros(8).to(dtype)
    with interpreted():
        cast_kernel[(1,)](x, out, 8)
    largest = torch.finfo(dtype).max if dtype.itemsize == 1 else torch.inf  # fp8 saturates, as on the GPU
    expected = x.clamp(-largest, largest).to(dtype)
    assert torch.equal(out.float().nan_to_num(7.0), expected.float().nan_to_num(7.0))
    assert torch.equal(out.float().signbit(), expected.float().signbit())


@pytest.mark.parametrize("flag", [0, 1, 2])
def test_masks_of_tiles_and_scalars(flag):
    out = torch.zeros(8)
    with interpreted():
        choose_kernel[(1,)](torch.ones(8), out, flag, n=8)
    assert out.tolist() == {0: [1] * 5 + [-1] * 2 + [0], 1: [-1] * 7 + [0], 2: [0] * 8}[flag]


def test_bf16_arithmetic_rounds_every_step():
    x, y = random(4096, dtype=torch.bfloat16), random(4096, dtype=torch.bfloat16, seed=1)
    out = torch.zeros_like(x)
    with interpreted():
        bf16_kernel[(1,)](x, y, out, 4096)
    assert torch.equal(out, torch.where(x > y, x * y - 1.5, torch.maximum(-x, y)) + 0.25)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_reductions_and_scans(dtype):
    x = random(256, dtype=dtype)
    total, largest, running = torch.zeros(1, dtype=dtype), torch.zeros(1, dtype=dtype), torch.zeros_like(x)
    with interpreted():
        reduce_kernel[(1,)](x, total, largest, running, 256)
    torch.testing.assert_close(total[0], x.double().sum().to(dtype))
    torch.testing.assert_close(running, x.double().cumsum(0).to(dtype))
    assert largest[0] == x.max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matmul(dtype):
    a, b, c = random(100, 72, dtype=dtype), random(90, 72, dtype=dtype, seed=1), torch.full((100, 90), torch.nan)
    tile = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}
    with interpreted():
        samples.matmul_kernel[(2, 2)](a, b, c, 100, 90, 72, 72, 72, 90, **tile)
    if dtype == torch.float32:  # tl.dot takes tf32 where it is not told otherwise
        torch.testing.assert_close(c, a @ b.T, rtol=0, atol=0.05)
        a, b = (x.view(torch.int32).bitwise_and(~0x1FFF).view(torch.float32) for x in (a, b))
    torch.testing.assert_close(c, a.float() @ b.float().T)


@pytest.mark.parametrize("on_host", [True, False])
def test_descriptors_pad_with_zeros_and_clip_stores(on_host):
    a, b = random(100, 72, dtype=torch.bfloat16), random(88, 72, dtype=torch.bfloat16, seed=1)
    c = torch.full((100, 88), torch.nan, dtype=torch.bfloat16)
    operands = [(a, [64, 32]), (b, [64, 32]), (c, [64, 64])]
    given = [TensorDescriptor.from_tensor(*operand) if on_host else operand[0] for operand in operands]
    with interpreted():
        samples.descriptor_matmul_kernel[(2, 2)](*given, 100, 88, 72, 64, 64, 32, on_host)
    torch.testing.assert_close(c, (a.float() @ b.float().T).bfloat16())
