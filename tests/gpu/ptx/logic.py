"""Bitwise operations, shifts, bit fields and byte permutation."""

from __future__ import annotations

import numpy as np

from .machine import Machine
from .opcodes import opcode
from .syntax import Instruction
from .values import B32, PREDICATE, UNSIGNED, Array, Type, unpack

BITWISE = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@opcode(*BITWISE)
def bitwise(m: Machine, ins: Instruction) -> None:
    kind = ins.type
    x, y = (m.value(o, kind) for o in ins.operands[1:3])
    m.put(ins.operands[0], BITWISE[ins.opcode](x, y), kind)


@opcode("not")
def invert(m: Machine, ins: Instruction) -> None:
    m.put(ins.operands[0], ~m.value(ins.operands[1], ins.type), ins.type)


@opcode("shl")
def shift_left(m: Machine, ins: Instruction) -> None:
    kind = ins.type
    x, amount = m.bits(ins.operands[1], kind.width), m.bits(ins.operands[2], 32)
    kept = amount < kind.width
    shifted = x << np.where(kept, amount, 0).astype(x.dtype)
    m.write(ins.operands[0], np.where(kept, shifted, x.dtype.type(0)))


@opcode("shr")
def shift_right(m: Machine, ins: Instruction) -> None:
    kind = ins.type
    x, amount = m.value(ins.operands[1], kind), m.bits(ins.operands[2], 32)
    if kind.kind == "s":
        shifted = x >> np.minimum(amount, kind.width - 1).astype(x.dtype)
    else:
        kept = amount < kind.width
        shifted = np.where(kept, x >> np.where(kept, amount, 0).astype(x.dtype), x.dtype.type(0))
    m.put(ins.operands[0], shifted, kind)


@opcode("shf")
def funnel_shift(m: Machine, ins: Instruction) -> None:
    low, high, amount = (m.bits(o, 32).astype(np.uint64) for o in ins.operands[1:4])
    amount = np.minimum(amount, 32) if "clamp" in ins.modifiers else amount & np.uint64(31)
    both = low | (high << np.uint64(32))
    result = (both << amount) >> np.uint64(32) if "l" in ins.modifiers else both >> amount
    m.write(ins.operands[0], result.astype(np.uint32))


@opcode("bfe")
def extract_field(m: Machine, ins: Instruction) -> None:
    kind = ins.type
    position, length = (m.bits(o, 32).astype(np.int64) & 255 for o in ins.operands[2:4])
    x = m.value(ins.operands[1], kind)
    x = x.astype(np.int64 if kind.kind == "s" else np.uint64)
    wide = x.dtype.type
    shifted = x >> np.minimum(position, 63).astype(wide)
    if kind.kind != "s":
        field = np.where(length >= 64, ~wide(0), (wide(1) << np.minimum(length, 63).astype(wide)) - wide(1))
        m.put(ins.operands[0], np.where(position < kind.width, shifted & field, wide(0)), kind)
        return
    # Beyond the register's end the field repeats the sign bit: arithmetic shifts of the sign-extended value do that.
    unused = (64 - np.minimum(length, 64)).astype(wide)
    signed = (shifted << np.minimum(unused, 63)) >> np.minimum(unused, 63)
    m.put(ins.operands[0], np.where(length == 0, wide(0), signed), kind)


@opcode("bfi")
def insert_field(m: Machine, ins: Instruction) -> None:
    width = ins.type.width
    field, base = (m.bits(o, width).astype(np.uint64) for o in ins.operands[1:3])
    position, length = (m.bits(o, 32).astype(np.uint64) & np.uint64(255) for o in ins.operands[3:5])
    one = np.uint64(1)
    ones = np.where(length >= 64, ~np.uint64(0), (one << np.minimum(length, np.uint64(63))) - one)
    window = np.where(position < 64, ones << np.minimum(position, np.uint64(63)), np.uint64(0))
    moved = field << np.minimum(position, np.uint64(63))
    m.write(ins.operands[0], ((base & ~window) | (moved & window)).astype(UNSIGNED[width]))


@opcode("prmt")
def permute_bytes(m: Machine, ins: Instruction) -> None:
    low, high, selector = (m.bits(o, 32).astype(np.uint64) for o in ins.operands[1:4])
    both = low | (high << np.uint64(32))
    result = np.zeros(np.broadcast(both, selector).shape, np.uint64)
    for i in range(4):
        pick = (selector >> np.uint64(4 * i)) & np.uint64(15)
        byte = (both >> ((pick & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
        signs = np.where(byte >= 128, np.uint64(255), np.uint64(0))
        result = result | (np.where(pick & np.uint64(8), signs, byte) << np.uint64(8 * i))
    m.write(ins.operands[0], result.astype(np.uint32))


@opcode("lop3")
def three_input_logic(m: Machine, ins: Instruction) -> None:
    a, b, c = (m.bits(o, 32) for o in ins.operands[1:4])
    table, result = ins.operands[4].bits, np.uint32(0)
    for i in range(8):
        if table >> i & 1:
            result = result | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
    m.write(ins.operands[0], np.asarray(result, np.uint32))


@opcode("popc")
def count_ones(m: Machine, ins: Instruction) -> None:
    x = np.asarray(m.bits(ins.operands[1], ins.type.width)).astype(np.uint64)
    m.put(ins.operands[0], sum((x >> np.uint64(i)) & np.uint64(1) for i in range(ins.type.width)), Type("u", 32))


@opcode("clz")
def leading_zeros(m: Machine, ins: Instruction) -> None:
    width = ins.type.width
    x = m.bits(ins.operands[1], width)
    used = sum((x >> x.dtype.type(i) != 0).astype(np.uint32) for i in range(width))
    m.put(ins.operands[0], np.uint32(width) - used, B32)


@opcode("brev")
def reverse_bits(m: Machine, ins: Instruction) -> None:
    width = ins.type.width
    x = m.bits(ins.operands[1], width)
    one, last = x.dtype.type(1), width - 1
    result = x & x.dtype.type(0)
    for i in range(width):
        result = result | (((x >> x.dtype.type(i)) & one) << x.dtype.type(last - i))
    m.write(ins.operands[0], result)


@opcode("selp")
def select(m: Machine, ins: Instruction) -> None:
    """Only the operand that is chosen has to be defined."""
    width, chosen, active = ins.type.width, m.predicate(ins.operands[3]), m.mask
    values = []
    for operand, wanted in zip(ins.operands[1:3], (chosen, ~chosen), strict=True):
        if m.undefined:
            m.mask = m.full(wanted) if active is None else wanted & active
        values.append(m.bits(operand, width))
    m.mask = active
    m.write(ins.operands[0], np.where(chosen, *values))


COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def compared(name: str, x: Array, y: Array, kind: Type) -> Array:
    """Float comparisons are false with a NaN, unless they end in u (unordered)."""
    if not kind.is_float:
        return COMPARE[name](x, y)
    unordered = np.isnan(x) | np.isnan(y)
    if name in ("nan", "num"):
        return unordered if name == "nan" else ~unordered
    return COMPARE[name](x, y) & ~unordered if name in COMPARE else COMPARE[name[:-1]](x, y) | unordered


@opcode("setp")
def compare(m: Machine, ins: Instruction) -> None:
    """A second destination takes the opposite or, of two packed numbers each, what the upper ones give."""
    kind, name = ins.type, ins.parts[1]
    if kind.lanes == 2:
        pairs = zip(*(unpack(m.bits(o, kind.bits), kind) for o in ins.operands[1:3]), strict=True)
        outcomes = [compared(name, x, y, kind) for x, y in pairs]
    else:
        result = compared(name, *(m.value(o, kind) for o in ins.operands[1:3]), kind)
        outcomes = [result, ~np.asarray(result)]
    destinations = getattr(ins.operands[0], "items", (ins.operands[0],))
    combine = next((COMBINE[p] for p in ins.parts[2:] if p in COMBINE), None)
    for register, outcome in zip(destinations, outcomes, strict=False):
        m.put(register, combine(outcome, m.predicate(ins.operands[3])) if combine else outcome, PREDICATE)
