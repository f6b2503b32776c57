"""Register types of PTX and how their bits are read as numbers.

A register holds unsigned bits (a predicate holds bools); an instruction's type says how to read them. bf16 has no NumPy
type: it is widened to float32 on reading and rounded to nearest even on writing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}

WARP = 32


class PtxTrap(RuntimeError):
    """The program did something a GPU forbids or leaves undefined: what, where, and the instruction."""


class UnknownInstruction(NotImplementedError):
    """An instruction, or one of its modifiers, that this executor does not model."""


@dataclass(frozen=True)
class Type:
    """`kind` is pred, b (bits), u, s, f or bf; `width` in bits; `lanes` 2 for the packed 16-bit types."""

    kind: str
    width: int
    lanes: int = 1

    @property
    def is_float(self) -> bool:
        return self.kind in ("f", "bf")

    @property
    def bits(self) -> int:
        """Width of the register that holds it."""
        return self.width * self.lanes

    @property
    def bytes(self) -> int:
        return self.bits // 8


PREDICATE = Type("pred", 1)
B16, B32, B64 = Type("b", 16), Type("b", 32), Type("b", 64)
F32 = Type("f", 32)


@cache
def parse_type(name: str) -> Type | None:
    """The type a modifier such as `s32`, `bf16x2` or `pred` names, None where it names no type."""
    if name == "pred":
        return PREDICATE
    if name == "tf32":
        return B32
    found = re.fullmatch(r"(bf|f|b|u|s)(8|16|32|64|128)(x2)?", name)
    if not found or (found[1] == "bf" and found[2] != "16"):
        return None
    return Type(found[1], int(found[2]), 2 if found[3] else 1)


def widen_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def round_bf16(values: Array) -> Array:
    """float32 or float64 -> bf16 bits, to nearest even with a single rounding; NaN becomes the canonical 0x7FFF."""
    wide = narrow_to_odd(values) if values.dtype == np.float64 else np.asarray(values, np.float32)
    bits = wide.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(wide), np.uint16(0x7FFF), rounded.astype(np.uint16))


def narrow_to_odd(values: Array) -> Array:
    """float64 -> float32 towards zero, with the last bit set where anything was lost.

    Rounding the result once more, to fewer bits, then equals one rounding of the float64.
    """
    values = np.asarray(values)
    near = values.astype(np.float32)
    exact = near.astype(np.float64) == values
    too_far = np.abs(near.astype(np.float64)) > np.abs(values)
    bits = near.view(np.uint32) - too_far.astype(np.uint32)
    odd = (bits | np.uint32(1)).view(np.float32)
    return np.where(exact | np.isnan(values), near, odd)


def round_tf32(bits: Array) -> Array:
    """cvt.rna.tf32: round half away from zero to 10 mantissa bits. NaN and infinity stay."""
    finite = (bits & np.uint32(0x7F800000)) != np.uint32(0x7F800000)
    return np.where(finite, (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000), bits)


def flush_denormals(values: Array) -> Array:
    """float32 subnormals become zeros of their sign (.ftz)."""
    tiny = np.abs(values) < np.float32(1.1754944e-38)
    return np.where(tiny, np.copysign(np.float32(0), values), values)


def decode(bits: Array, kind: Type) -> Array:
    """Register bits of the type's width -> numbers."""
    if kind.kind == "bf":
        return widen_bf16(bits)
    if kind.kind == "f":
        return bits.view(FLOAT[kind.width])
    if kind.kind == "s":
        return bits.view(SIGNED[kind.width])
    return bits


def encode(values: Array, kind: Type) -> Array:
    """Numbers -> register bits of the type's width; integers wrap, floats round to nearest even."""
    values = np.asarray(values)
    if kind.kind == "pred":
        return values.astype(bool, copy=False)
    if kind.kind == "bf":
        return round_bf16(values)
    if kind.kind == "f":
        if kind.width == 16 and values.dtype == np.float64:
            return values.astype(np.float16).view(np.uint16)
        return values.astype(FLOAT[kind.width], copy=False).view(UNSIGNED[kind.width])
    if kind.kind == "s":
        return values.astype(SIGNED[kind.width], copy=False).view(UNSIGNED[kind.width])
    return values.astype(UNSIGNED[kind.width], copy=False)


def unpack(bits: Array, kind: Type) -> list[Array]:
    """The two halves of a packed register, low first."""
    half = Type(kind.kind, kind.width)
    low, high = bits.astype(np.uint16), (bits >> np.uint32(16)).astype(np.uint16)
    return [decode(low, half), decode(high, half)]


def pack(halves: list[Array], kind: Type) -> Array:
    half = Type(kind.kind, kind.width)
    low, high = (encode(v, half).astype(np.uint32) for v in halves)
    return low | (high << np.uint32(16))
