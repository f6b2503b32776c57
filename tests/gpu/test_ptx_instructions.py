"""Single instructions against exact arithmetic, special values included."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from gpu.ptx_sources import evaluate, run_by_hand

TINY, SUBNORMAL = np.float32(1.1754944e-38), np.float32(1e-40)
SPECIAL = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, SUBNORMAL, -SUBNORMAL, TINY, 1.0, -1.0], np.float32)
RANDOM = np.random.default_rng(0)


def same(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal with the sign of zeros, NaN equal to NaN."""
    np.testing.assert_array_equal(found, expected)
    zero = expected == 0
    np.testing.assert_array_equal(np.signbit(found[zero]), np.signbit(expected[zero]))


@pytest.mark.parametrize(
    ("name", "exact", "low", "high"),
    [
        ("ex2.approx.f32", lambda x: 2.0**x, -140, 120),
        ("ex2.approx.ftz.f32", lambda x: 2.0**x, -120, 120),
        ("lg2.approx.f32", math.log2, 1e-30, 1e30),
        ("rcp.approx.f32", lambda x: 1 / x, 1e-30, 1e30),
        ("rcp.rn.f32", lambda x: 1 / x, 1e-30, 1e30),
        ("sqrt.rn.f32", math.sqrt, 0, 1e30),
        ("rsqrt.approx.f32", lambda x: 1 / math.sqrt(x), 1e-30, 1e30),
        ("sin.approx.f32", math.sin, -3, 3),
        ("cos.approx.f32", math.cos, -3, 3),
        ("tanh.approx.f32", math.tanh, -9, 9),
    ],
)
def test_functions_are_rounded_once(name, exact, low, high):
    x = RANDOM.uniform(low, high, 512).astype(np.float32)
    expected = np.array([exact(float(v)) for v in x]).astype(np.float32)
    np.testing.assert_array_max_ulp(evaluate(f"{name} %r9, %r1;", x), expected, maxulp=1)


def test_special_values():
    inf, nan = np.inf, np.nan
    same(evaluate("lg2.approx.f32 %r9, %r1;", SPECIAL)[:5], np.array([-inf, -inf, inf, nan, nan], np.float32))
    same(evaluate("lg2.approx.ftz.f32 %r9, %r1;", SPECIAL)[5:7], np.array([-inf, -inf], np.float32))
    same(
        evaluate("rcp.approx.ftz.f32 %r9, %r1;", SPECIAL)[:7],
        np.array([inf, -inf, 0, -0.0, nan, inf, -inf], np.float32),
    )
    same(evaluate("ex2.approx.ftz.f32 %r9, %r1;", SPECIAL)[:5], np.array([1, 1, inf, 0, nan], np.float32))
    same(evaluate("rsqrt.approx.f32 %r9, %r1;", SPECIAL)[:4], np.array([inf, -inf, 0, nan], np.float32))
    same(evaluate("add.ftz.f32 %r9, %r1, %r1;", SPECIAL)[5:8], np.array([0, -0.0, 2 * TINY], np.float32))
    same(evaluate("add.f32 %r9, %r1, %r1;", SPECIAL)[5:7], np.array([2 * SUBNORMAL, -2 * SUBNORMAL], np.float32))
    same(evaluate("ex2.approx.f32 %r9, %r1;", np.float32([-130, -160])), np.array([2.0**-130, 0], np.float32))
    same(evaluate("ex2.approx.ftz.f32 %r9, %r1;", np.float32([-130])), np.array([0], np.float32))


def test_minimum_and_maximum_of_nan():
    x, y = np.float32([np.nan, 1, np.nan]), np.float32([2, np.nan, np.nan])
    same(evaluate("max.f32 %r9, %r1, %r2;", x, y), np.float32([2, 1, np.nan]))
    same(evaluate("min.NaN.f32 %r9, %r1, %r2;", x, y), np.float32([np.nan, np.nan, np.nan]))


def test_comparison_of_packed_halves():
    x, y = (torch.tensor(v, dtype=torch.bfloat16) for v in ([1.0, 3.0, 3.0, 1.0, 2.0, math.nan], [2.0] * 6))
    found = evaluate(
        "setp.gt.bf16x2 %p1|%p2, %r1, %r2;\nselp.b32 %r3, 1, 0, %p1;\nselp.b32 %r9, 2, 0, %p2;\nadd.s32 %r9, %r9, %r3;",
        x.view(torch.int32).numpy(), y.view(torch.int32).numpy(), out=torch.int32,
    )  # fmt: skip
    assert found.tolist() == [2, 1, 0]


def test_fma_rounds_once():
    """Random operands and cases in which the sum, rounded to fp64 first, would lie halfway between two floats."""
    x = RANDOM.standard_normal(256).astype(np.float32)
    y = RANDOM.standard_normal(256).astype(np.float32)
    z = (-x * y * np.float32(1 + 2**-20)).astype(np.float32)
    x[:2], y[:2], z[:2] = np.float32([1 + 2**-12, 1 + 2**-12]), np.float32(1 + 2**-12), np.float32([2**-60, -(2**-60)])
    found = evaluate("fma.rn.f32 %r9, %r1, %r2, %r3;", x, y, z)
    exact = [Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c)) for a, b, c in zip(x, y, z, strict=True)]
    for value, number in zip(found, exact, strict=True):
        error = abs(Fraction(float(value)) - number)
        for other in (np.nextafter(value, np.float32(np.inf)), np.nextafter(value, np.float32(-np.inf))):
            assert error <= abs(Fraction(float(other)) - number)


@pytest.mark.parametrize(
    ("operation", "function"),
    [
        ("add.s32", lambda a, b: a + b),
        ("sub.s32", lambda a, b: a - b),
        ("mul.lo.s32", lambda a, b: a * b),
        ("mul.hi.s32", lambda a, b: a * b >> 32),
        ("min.s32", min),
        ("max.s32", max),
        ("min.relu.s32", lambda a, b: max(min(a, b), 0)),
        ("max.relu.s32", lambda a, b: max(a, b, 0)),
        ("div.s32", lambda a, b: int(a / b)),
        ("rem.s32", lambda a, b: math.fmod(a, b)),
        ("and.b32", lambda a, b: a & b),
        ("xor.b32", lambda a, b: a ^ b),
        ("shl.b32", lambda a, b: a << b % 2**32 if 0 <= b < 32 else 0),
        ("shr.s32", lambda a, b: a >> (b if 0 <= b < 32 else 31)),
    ],
)
def test_integers(operation, function):
    a = RANDOM.integers(-(2**31), 2**31, 200).astype(np.int32)
    b = np.where(np.arange(200) % 2, RANDOM.integers(1, 40, 200), RANDOM.integers(-(2**31), -1, 200)).astype(np.int32)
    found = evaluate(f"{operation} %r9, %r1, %r2;", a, b, out=torch.int32)
    expected = [int(function(int(x), int(y))) % 2**32 for x, y in zip(a, b, strict=True)]
    np.testing.assert_array_equal(found.view(np.uint32), np.array(expected, np.uint32))


def test_wide_high_product():
    """mul.hi.u64 and .s64, which nvcc divides by constants with."""
    a, b = (torch.tensor(RANDOM.integers(-(2**63), 2**63, 32)) for _ in range(2))
    out = torch.zeros(64, dtype=torch.int64)
    run_by_hand(
        """
        mul.wide.u32 %d9, %r0, 8;
        add.s64 %d10, %d0, %d9;
        ld.global.b64 %d11, [%d10];
        add.s64 %d10, %d1, %d9;
        ld.global.b64 %d12, [%d10];
        mul.hi.s64 %d13, %d11, %d12;
        mul.hi.u64 %d14, %d11, %d12;
        add.s64 %d10, %d2, %d9;
        st.global.b64 [%d10], %d13;
        st.global.b64 [%d10+256], %d14;
        """,
        [a, b, out],
    )
    pairs = list(zip(a.tolist(), b.tolist(), strict=True))
    assert out[:32].tolist() == [x * y >> 64 for x, y in pairs]
    assert [v % 2**64 for v in out[32:].tolist()] == [(x % 2**64) * (y % 2**64) >> 64 for x, y in pairs]


def test_bit_fields():
    x = RANDOM.integers(0, 2**32, 64).astype(np.uint32)
    words = x.tolist()
    same(
        evaluate("bfe.u32 %r9, %r1, 4, 15;", x, out=torch.int32).view(np.uint32),
        np.array([v >> 4 & 0x7FFF for v in words]),
    )
    signed = [(v >> 3 & 1) * -1 for v in words]
    same(evaluate("bfe.s32 %r9, %r1, 3, 1;", x, out=torch.int32), np.array(signed))
    inserted = [(0xFFFFFFFF & ~(0xFF << 8)) | (v & 0xFF) << 8 for v in words]
    same(evaluate("bfi.b32 %r9, %r1, -1, 8, 8;", x, out=torch.int32).view(np.uint32), np.array(inserted))
    swapped = [int.from_bytes(v.to_bytes(4, "little"), "big") for v in words]
    same(evaluate("prmt.b32 %r9, %r1, 0, 0x0123;", x, out=torch.int32).view(np.uint32), np.array(swapped))
    same(evaluate("popc.b32 %r9, %r1;", x, out=torch.int32), np.array([v.bit_count() for v in words]))
    same(evaluate("clz.b32 %r9, %r1;", x, out=torch.int32), np.array([32 - v.bit_length() for v in words]))
    reversed_bits = [int(f"{v:032b}"[::-1], 2) for v in words]
    same(evaluate("brev.b32 %r9, %r1;", x, out=torch.int32).view(np.uint32), np.array(reversed_bits))
    majority = evaluate("lop3.b32 %r9, %r1, 0x0F0F0F0F, 0x00FF00FF, 0xE8;", x, out=torch.int32).view(np.uint32)
    a, b = 0x0F0F0F0F, 0x00FF00FF
    same(majority, np.array([v & a | v & b | a & b for v in words]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packed_conversion(dtype):
    """High half first; to nearest even, as PyTorch rounds."""
    x, y = (RANDOM.standard_normal(128).astype(np.float32) * 300 for _ in range(2))
    name = {torch.bfloat16: "bf16x2", torch.float16: "f16x2"}[dtype]
    found = evaluate(f"cvt.rn.{name}.f32 %r9, %r1, %r2;", x, y, out=torch.int32)
    halves = torch.tensor(found).view(dtype).reshape(-1, 2)
    assert torch.equal(halves, torch.stack([torch.tensor(y), torch.tensor(x)], 1).to(dtype))


def test_conversion_to_integers():
    x = np.float32([1.5, 2.5, -1.5, 3e9, -3e9, np.nan, np.inf])
    top, bottom = 2**31 - 1, -(2**31)
    same(evaluate("cvt.rni.s32.f32 %r9, %r1;", x, out=torch.int32), np.array([2, 2, -2, top, bottom, 0, top]))
    same(evaluate("cvt.rzi.s32.f32 %r9, %r1;", x, out=torch.int32), np.array([1, 2, -1, top, bottom, 0, top]))


def test_tf32_rounding():
    x = np.array([0x3F801000, 0x3F800FFF, 0x7F800000, 0xBF803000], np.uint32).view(np.float32)
    expected = np.array([0x3F802000, 0x3F800000, 0x7F800000, 0xBF804000], np.uint32).view(np.float32)
    same(evaluate("cvt.rna.tf32.f32 %r9, %r1;", x), expected)


@pytest.mark.parametrize(
    ("mode", "operands", "expected"),
    [
        ("bfly", "5, 31", [i ^ 5 for i in range(32)]),
        ("idx", "7, 31", [7] * 32),
        ("down", "3, 31", [min(i + 3, 31) if i + 3 < 32 else i for i in range(32)]),
        ("up", "3, 0", [i - 3 if i >= 3 else i for i in range(32)]),
        ("bfly", "4, 0x1807", [i ^ 4 for i in range(32)]),
        ("idx", "1, 0x181F", [i // 8 * 8 + 1 for i in range(32)]),
    ],
)
def test_shuffles(mode, operands, expected):
    lanes = np.arange(32, dtype=np.int32)
    found = evaluate(f"shfl.sync.{mode}.b32 %r9, %r1, {operands}, -1;", lanes, out=torch.int32)
    assert found.tolist() == expected


def test_votes_and_reductions():
    lanes = np.arange(32, dtype=np.int32)

    def vote(body: str) -> list[int]:
        return evaluate(f"setp.lt.s32 %p1, %r1, 5;\n{body}", lanes, out=torch.int32).tolist()

    assert vote("vote.sync.ballot.b32 %r9, %p1, -1;") == [31] * 32
    assert vote("vote.sync.any.pred %p2, %p1, -1;\nselp.b32 %r9, 1, 0, %p2;") == [1] * 32
    assert vote("vote.sync.all.pred %p2, %p1, -1;\nselp.b32 %r9, 1, 0, %p2;") == [0] * 32
    assert vote("redux.sync.add.s32 %r9, %r1, -1;") == [496] * 32
    assert vote("shr.u32 %r2, %r1, 3;\nmatch.any.sync.b32 %r9, %r2, -1;")[9] == 0xFF00


def test_atomics_take_turns():
    old = torch.zeros(32, dtype=torch.int32)
    total = torch.zeros(1, dtype=torch.int32)
    run_by_hand(
        """
        atom.global.add.u32 %r1, [%d1], 2;
        mul.wide.u32 %d9, %r0, 4;
        add.s64 %d10, %d0, %d9;
        st.global.b32 [%d10], %r1;
        """,
        [old, total],
    )
    assert total.item() == 64 and old.tolist() == list(range(0, 64, 2))


def test_loop_with_different_trip_counts():
    """Lanes that leave a loop earlier wait for the others where the branches meet."""
    lanes = np.arange(32, dtype=np.int32)
    body = """
    mov.b32 %r9, 0;
    again:
    add.s32 %r9, %r9, %r1;
    add.s32 %r1, %r1, -1;
    setp.gt.s32 %p1, %r1, 0;
    @%p1 bra again;
    """
    assert evaluate(body, lanes, out=torch.int32).tolist() == [n * (n + 1) // 2 for n in range(32)]
