"""How the lanes of a warp share a matrix: fragments of the m16n8 products (PTX ISA, warp-level matrix fragments).

Lane l holds row l / 4 and the l % 4-th group of columns; a register holds as many elements as fit into 32 bits.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from .values import WARP, Array, UnknownInstruction, widen_bf16

LANE = np.arange(WARP)
GROUP, MEMBER = LANE // 4, LANE % 4
ELEMENTS = {"bf16": 2, "f16": 2, "tf32": 1, "s8": 4, "u8": 4}
TF32_BITS = np.uint32(0xFFFFE000)


def element_values(words: Array, element: str) -> Array:
    """32-bit words [...] -> float32 elements [..., elements per word]. 8-bit integers and their sums stay exact."""
    words = np.ascontiguousarray(words)
    shape = (*words.shape, ELEMENTS[element])
    if element == "tf32":
        return (words & TF32_BITS).view(np.float32).reshape(shape)
    if element == "bf16":
        return widen_bf16(words.view(np.uint16)).reshape(shape)
    if element == "f16":
        return words.view(np.float16).astype(np.float32).reshape(shape)
    return words.view(np.int8 if element == "s8" else np.uint8).astype(np.float32).reshape(shape)


def elements_per_word(element: str) -> int:
    if element not in ELEMENTS:
        raise UnknownInstruction(f"tensor-core operands of type {element} are not modelled")
    return ELEMENTS[element]


@cache
def _left_order(registers: int, per_word: int) -> Array:
    """For every element of A [16, k], where it lies among (lane, register, element)."""
    depth = 4 * per_word * (registers // 2)
    order = np.zeros((16, depth), np.int64)
    for r in range(registers):
        for e in range(per_word):
            row, column = GROUP + 8 * (r & 1), MEMBER * per_word + e + 4 * per_word * (r >> 1)
            order[row, column] = (LANE * registers + r) * per_word + e
    return order


@cache
def _right_order(registers: int, per_word: int) -> Array:
    """For every element of B [k, 8], where it lies among (lane, register, element)."""
    order = np.zeros((4 * per_word * registers, 8), np.int64)
    for r in range(registers):
        for e in range(per_word):
            order[MEMBER * per_word + e + 4 * per_word * r, GROUP] = (LANE * registers + r) * per_word + e
    return order


def left_matrix(words: Array, element: str) -> Array:
    """Registers [warps, 32, registers] -> A [warps, 16, k]."""
    order = _left_order(words.shape[2], elements_per_word(element))
    return element_values(words, element).reshape(len(words), -1)[:, order]


def right_matrix(words: Array, element: str) -> Array:
    """Registers [warps, 32, registers] -> B [warps, k, 8]."""
    order = _right_order(words.shape[2], elements_per_word(element))
    return element_values(words, element).reshape(len(words), -1)[:, order]


def result_rows(index: int) -> tuple[Array, Array]:
    """Row and column, per lane, of accumulator element `index` in a tile of 16 rows."""
    return GROUP + 8 * ((index >> 1) & 1), (index >> 2) * 8 + MEMBER * 2 + (index & 1)
