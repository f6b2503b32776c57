"""mov, cvt and the address conversions."""

from __future__ import annotations

import numpy as np

from .machine import Machine
from .memory import WINDOW_BYTES, WINDOWS
from .opcodes import opcode, refuse
from .syntax import IMPLICIT_DEFINITION, Instruction, Symbol, Vector
from .values import B64, F32, FLOAT, UNSIGNED, Array, Type, UnknownInstruction

from .values import encode, flush_denormals, pack, round_tf32  # isort: skip

TO_INTEGER = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


@opcode(IMPLICIT_DEFINITION)
def implicit_definition(m: Machine, ins: Instruction) -> None:
    """The compiler says that any value will do: all ones, which is NaN or -1."""
    bits = m.kernel.register_bits[ins.operands[0].name]
    m.write(ins.operands[0], np.array(True) if bits == 1 else ~np.zeros((), UNSIGNED[bits]))


@opcode("mov")
def move(m: Machine, ins: Instruction) -> None:
    target, source = ins.operands
    kind = ins.type
    if kind.kind == "pred":
        m.put_predicate(target, m.predicate(source))
    elif isinstance(target, Vector):
        _split(m, target, source, kind)
    elif isinstance(source, Vector):
        m.write(target, _join(m, source, kind))
    elif isinstance(source, Symbol) and source.name in {p.name for p in m.kernel.parameters}:
        m.write(target, np.array(_parameter_offset(m, source.name), UNSIGNED[kind.bits]))
    else:
        m.write(target, m.bits(source, kind.bits))


def _parameter_offset(m: Machine, name: str) -> int:
    return next(p.offset for p in m.kernel.parameters if p.name == name)


def _split(m: Machine, target: Vector, source: object, kind: Type) -> None:
    width = kind.width // len(target.items)
    whole = m.bits(source, kind.width)
    for i, register in enumerate(target.items):
        part = whole >> whole.dtype.type(width * i)
        m.write(register, part.astype(UNSIGNED[width]))


def _join(m: Machine, source: Vector, kind: Type) -> Array:
    width, wide = kind.width // len(source.items), UNSIGNED[kind.width]
    joined = wide(0)
    for i, register in enumerate(source.items):
        joined = joined | (m.bits(register, width).astype(wide) << wide(width * i))
    return np.asarray(joined)


@opcode("cvta")
def convert_address(m: Machine, ins: Instruction) -> None:
    """Global addresses are generic already; shared, local and parameter addresses have windows of their own."""
    spaces = {p.split("::")[0] for p in ins.parts}
    window = next((start for name, start in WINDOWS.items() if name in spaces), 0)
    source = m.bits(ins.operands[1], 64)
    inside = window and (source - np.uint64(window)) < np.uint64(WINDOW_BYTES)
    if not window:
        m.put(ins.operands[0], source, B64)
    elif "to" in ins.modifiers:
        m.put(ins.operands[0], np.where(inside, source - np.uint64(window), source), B64)
    else:
        m.put(ins.operands[0], np.where(inside, source, source + np.uint64(window)), B64)


@opcode("cvt")
def convert(m: Machine, ins: Instruction) -> None:
    if "pack" in ins.modifiers:
        raise UnknownInstruction(f"cvt.pack is not modelled: {ins.text}")
    if "tf32" in ins.modifiers:
        refuse(ins, "relu", "rz", "satfinite")
        _convert_tf32(m, ins)
        return
    if len(ins.types) != 2:
        raise UnknownInstruction(f"conversion is not modelled: {ins.text}")
    target, source = ins.types
    if target.lanes == 2:
        _convert_packed(m, ins, target, source)
        return
    value = m.value(ins.operands[1], source)
    m.put(ins.operands[0], convert_values(value, source, target, ins), target)


def _convert_tf32(m: Machine, ins: Instruction) -> None:
    bits = m.bits(ins.operands[1], 32)
    if "rna" in ins.modifiers:
        m.write(ins.operands[0], round_tf32(bits))
        return
    finite = (bits & np.uint32(0x7F800000)) != np.uint32(0x7F800000)
    up = np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    m.write(ins.operands[0], np.where(finite, (bits + up) & np.uint32(0xFFFFE000), bits))


def _convert_packed(m: Machine, ins: Instruction, target: Type, source: Type) -> None:
    """The first operand becomes the high half."""
    refuse(ins, "rz", "satfinite", "rs")
    if source != F32:
        raise UnknownInstruction(f"conversion is not modelled: {ins.text}")
    high, low = (m.value(o, F32) for o in ins.operands[1:3])
    if "relu" in ins.modifiers:
        high, low = (np.where(np.isnan(v), v, np.fmax(v, np.float32(0))) for v in (high, low))
    m.write(ins.operands[0], pack([low, high], target))


def convert_values(value: Array, source: Type, target: Type, ins: Instruction) -> Array:
    if source.is_float and not target.is_float:
        return _float_to_integer(value, target, ins)
    if not source.is_float and not target.is_float:
        if "sat" in ins.modifiers:
            limits = np.iinfo(encode(np.zeros(()), target).dtype if target.kind != "s" else f"i{target.width // 8}")
            return np.clip(value, *_within(limits, value))
        return value
    refuse(ins, "rm", "rp", "relu", "satfinite", "rna", "rs")
    if source.is_float and "rzi" in ins.modifiers:
        value = np.trunc(value)
    elif source.is_float:
        value = next((TO_INTEGER[p](value) for p in ins.parts if p in TO_INTEGER), value)
    result = _narrow_towards_zero(value, target) if "rz" in ins.modifiers else value
    if not source.is_float and target.width < 64:
        # int64 -> fp32 through fp64 would round twice; NumPy converts directly.
        result = value.astype(FLOAT[target.width]) if target.kind == "f" else value.astype(np.float64)
    if "sat" in ins.modifiers:
        result = np.where(np.isnan(result), 0, np.clip(result, 0, 1))
    if "ftz" in ins.modifiers and F32 in (source, target):
        result = flush_denormals(np.asarray(result, np.float32)) if result.dtype != np.float64 else result
    return result


def _narrow_towards_zero(value: Array, target: Type) -> Array:
    if target.kind != "f" or value.dtype.itemsize * 8 <= target.width:
        raise UnknownInstruction(f"rounding towards zero to {target} is not modelled")
    near = value.astype(FLOAT[target.width])
    beyond = np.abs(near.astype(value.dtype)) > np.abs(value)
    return np.where(beyond, np.nextafter(near, near.dtype.type(0)), near)


def _within(limits: np.iinfo, value: Array) -> tuple[int, int]:
    own = np.iinfo(value.dtype)
    return max(limits.min, own.min), min(limits.max, own.max)


def _float_to_integer(value: Array, target: Type, ins: Instruction) -> Array:
    """Out-of-range values saturate; NaN becomes 0."""
    rounding = next((p for p in ins.parts if p in TO_INTEGER), None)
    if rounding is None:
        raise UnknownInstruction(f"conversion to an integer without a rounding mode: {ins.text}")
    whole = np.asarray(TO_INTEGER[rounding](value)).astype(np.float64)
    signed = target.kind == "s"
    low = -(2.0 ** (target.width - 1)) if signed else 0.0
    high = 2.0 ** (target.width - (1 if signed else 0))
    wide = np.int64 if signed else np.uint64
    top, inside = wide(int(high) - 1), (whole >= low) & (whole < high)
    clipped = np.where(inside, whole, 0).astype(wide)
    clipped = np.where(whole >= high, top, clipped)
    clipped = np.where(whole < low, wide(int(low)), clipped)
    return clipped
