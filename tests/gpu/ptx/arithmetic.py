"""Integer and floating-point arithmetic.

fp32 results are rounded once. The `.approx` functions are evaluated in fp64 and rounded: at least as close as a GPU,
with its special values (signed zeros, infinities, subnormals flushed under .ftz).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .machine import Machine
from .opcodes import opcode, refuse
from .syntax import Instruction
from .values import FLOAT, SIGNED, UNSIGNED, Array, Type, flush_denormals, pack, unpack

UNMODELLED_ROUNDING = ("rz", "rm", "rp", "cc")


def apply(m: Machine, ins: Instruction, function: Callable[..., Array], count: int) -> None:
    """Write `function` of `count` operands, element by element, with .ftz and .sat."""
    refuse(ins, *UNMODELLED_ROUNDING)
    kind, sources = ins.type, ins.operands[1 : 1 + count]
    if kind.lanes == 2:
        halves = zip(*(unpack(m.bits(s, 32), kind) for s in sources), strict=True)
        m.write(ins.operands[0], pack([function(*h) for h in halves], kind))
        return
    values = [m.value(s, kind) for s in sources]
    flush = "ftz" in ins.modifiers and kind == Type("f", 32)
    if flush:
        values = [flush_denormals(v) for v in values]
    result = function(*values)
    if kind.is_float and "sat" in ins.modifiers:
        result = np.where(np.isnan(result), 0, np.clip(result, 0, 1)).astype(result.dtype)
    if flush:
        result = flush_denormals(result.astype(np.float32))
    m.put(ins.operands[0], result, kind)


@opcode("add")
def add(m: Machine, ins: Instruction) -> None:
    apply(m, ins, np.add, 2)


@opcode("sub")
def subtract(m: Machine, ins: Instruction) -> None:
    apply(m, ins, np.subtract, 2)


@opcode("mul", "mul24")
def multiply(m: Machine, ins: Instruction) -> None:
    if ins.type.is_float:
        apply(m, ins, np.multiply, 2)
    else:
        kind = ins.type
        x, y = (m.value(o, kind) for o in ins.operands[1:3])
        m.put(ins.operands[0], *_integer_product(x, y, kind, ins))


@opcode("mad", "fma")
def multiply_add(m: Machine, ins: Instruction) -> None:
    kind = ins.type
    if kind.is_float:
        apply(m, ins, fused_multiply_add, 3)
        return
    refuse(ins, *UNMODELLED_ROUNDING, "sat")
    x, y = (m.value(o, kind) for o in ins.operands[1:3])
    product, wide = _integer_product(x, y, kind, ins)
    m.put(ins.operands[0], product + m.value(ins.operands[3], wide), wide)


def _integer_product(x: Array, y: Array, kind: Type, ins: Instruction) -> tuple[Array, Type]:
    table = SIGNED if kind.kind == "s" else UNSIGNED
    if "wide" in ins.modifiers:
        wide = Type(kind.kind, 2 * kind.width)
        return x.astype(table[wide.width]) * y.astype(table[wide.width]), wide
    if "hi" not in ins.modifiers:
        return x * y, kind
    if kind.width < 64:
        wide_product = x.astype(table[64]) * y.astype(table[64])
        return wide_product >> table[64](kind.width), kind
    high = _high_unsigned(x.view(np.uint64), y.view(np.uint64))
    if kind.kind == "s":
        high = high - np.where(x < 0, y.view(np.uint64), 0) - np.where(y < 0, x.view(np.uint64), 0)
    return high.astype(np.uint64).view(table[64]), kind


def _high_unsigned(x: Array, y: Array) -> Array:
    """High 64 bits of a 128-bit product, by halves."""
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    xl, xh, yl, yh = x & low, x >> half, y & low, y >> half
    middle = (xl * yl >> half) + (xh * yl & low) + xl * yh
    carry = xh * yl >> half
    return xh * yh + carry + (middle >> half)


def fused_multiply_add(x: Array, y: Array, z: Array) -> Array:
    """x y + z with one rounding (fp64: to 64 bits first, then to 53)."""
    if x.dtype == np.float64:
        wide = x.astype(np.longdouble) * y.astype(np.longdouble) + z.astype(np.longdouble)
        return wide.astype(np.float64)
    product, addend = x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64)
    total = np.asarray(product + addend)
    rest = total - product
    lost = (product - (total - rest)) + (addend - rest)
    even = (total.view(np.int64) & 1) == 0
    inexact = np.isfinite(lost) & (lost != 0) & even
    step = np.where((lost > 0) == (total > 0), 1, -1)
    odd = np.where(inexact, total.view(np.int64) + step, total.view(np.int64)).view(np.float64)
    return odd.astype(np.float32) if x.dtype == np.float32 and z.dtype == np.float32 else odd


def _extreme(m: Machine, ins: Instruction, ignoring: np.ufunc, spreading: np.ufunc) -> None:
    relu = "relu" in ins.modifiers and not ins.type.is_float  # negative results become 0
    refuse(ins, "xorsign", *(() if relu else ("relu",)))
    numbers = ignoring if ins.type.is_float and "NaN" not in ins.modifiers else spreading
    apply(m, ins, (lambda x, y: np.maximum(numbers(x, y), 0)) if relu else numbers, 2)


@opcode("min")
def minimum(m: Machine, ins: Instruction) -> None:
    _extreme(m, ins, np.fmin, np.minimum)


@opcode("max")
def maximum(m: Machine, ins: Instruction) -> None:
    _extreme(m, ins, np.fmax, np.maximum)


@opcode("div")
def divide(m: Machine, ins: Instruction) -> None:
    if ins.type.is_float:
        apply(m, ins, np.divide, 2)
    else:
        apply(m, ins, lambda x, y: _quotient(x, y)[0], 2)


@opcode("rem")
def remainder(m: Machine, ins: Instruction) -> None:
    apply(m, ins, lambda x, y: _quotient(x, y)[1], 2)


def _quotient(x: Array, y: Array) -> tuple[Array, Array]:
    """Division towards zero; by zero the quotient is all ones and the remainder x, as hardware has it."""
    safe = np.where(y == 0, y.dtype.type(1), y)
    remainder = np.fmod(x, safe)
    quotient = (x - remainder) // safe
    ones = np.invert(np.zeros_like(quotient))
    return np.where(y == 0, ones, quotient), np.where(y == 0, x, remainder)


@opcode("neg")
def negate(m: Machine, ins: Instruction) -> None:
    apply(m, ins, np.negative, 1)


@opcode("abs")
def absolute(m: Machine, ins: Instruction) -> None:
    apply(m, ins, np.abs, 1)


@opcode("copysign")
def copy_sign(m: Machine, ins: Instruction) -> None:
    apply(m, ins, lambda sign, value: np.copysign(value, sign), 2)


def _reciprocal_root(x: Array) -> Array:
    return 1 / np.sqrt(x)


FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "ex2": np.exp2, "lg2": np.log2, "rcp": np.reciprocal, "sqrt": np.sqrt, "rsqrt": _reciprocal_root,
    "sin": np.sin, "cos": np.cos, "tanh": np.tanh,
}  # fmt: skip


@opcode(*FUNCTIONS)
def function(m: Machine, ins: Instruction) -> None:
    evaluate = FUNCTIONS[ins.opcode]

    def in_double(x: Array) -> Array:
        result = evaluate(np.asarray(x, np.float64))
        return result if ins.type.kind == "bf" else np.asarray(result).astype(FLOAT[ins.type.width])

    apply(m, ins, in_double, 1)


@opcode("dp4a")
def dot_bytes(m: Machine, ins: Instruction) -> None:
    """acc + sum of four byte products; the two types say how each operand's bytes are read."""
    kinds = [np.int8 if t.kind == "s" else np.uint8 for t in ins.types]
    x, y = (
        np.ascontiguousarray(m.full_bits(o, 32)).view(k).astype(np.int64).reshape(-1, 4)
        for o, k in zip(ins.operands[1:3], kinds, strict=True)
    )
    total = (x * y).sum(1) + m.full_bits(ins.operands[3], 32).astype(np.int64)
    m.write(ins.operands[0], total.astype(np.uint32))
