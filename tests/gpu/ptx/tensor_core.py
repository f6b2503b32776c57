"""mma.sync, ldmatrix and stmatrix. Products and sums run in float32, integers exactly."""

from __future__ import annotations

import numpy as np

from .control import Wait, whole_warp
from .data_movement import require_aligned
from .fragments import left_matrix, result_rows, right_matrix
from .machine import Machine
from .memory import READABLE_BIT
from .opcodes import opcode, refuse
from .syntax import Instruction
from .values import WARP, Array, UnknownInstruction


def warp_words(m: Machine, registers: tuple[object, ...], warps: Array) -> Array:
    """[warps, 32, registers] bits of the active warps."""
    return np.stack([m.full_bits(r, 32).reshape(-1, WARP)[warps] for r in registers], -1)


def per_lane(m: Machine, rows: Array, warps: Array) -> Array:
    """[warps, 32] of the active warps -> one value per lane."""
    if len(warps) * WARP == m.lanes:
        return np.ascontiguousarray(rows).reshape(-1)
    out = np.zeros((m.lanes // WARP, WARP), rows.dtype)
    out[warps] = rows
    return out.reshape(-1)


@opcode("mma.sync")
def matrix_product(m: Machine, ins: Instruction) -> Wait | None:
    wait = whole_warp(m, "mma.sync")
    if wait:
        return wait
    refuse(ins, "sp", "sp::ordered_metadata", "xor", "block_scale")
    if not ins.parts[3].startswith("m16n8") or ins.parts[4:6] != ("row", "col"):
        raise UnknownInstruction(f"matrix shape is not modelled: {ins.text}")
    result, left, right = ins.parts[-4:-1]
    warps = m.whole_warps("mma.sync") // WARP
    target, a, b, c = (o.items for o in ins.operands)
    product = left_matrix(warp_words(m, a, warps), left) @ right_matrix(warp_words(m, b, warps), right)
    if result == "f16":
        _add_half(m, product, target, c, warps)
        return None
    for i in range(4):
        row, column = result_rows(i)
        part, old = product[:, row, column], m.full_bits(c[i], 32).reshape(-1, WARP)[warps]
        m.write(target[i], per_lane(m, accumulate(part, old, result, "satfinite" in ins.modifiers), warps))
    return None


def accumulate(product: Array, old: Array, result: str, saturate: bool = False) -> Array:
    """Accumulator bits plus float32 products -> accumulator bits."""
    if result == "s32":
        total = old.view(np.int32).astype(np.int64) + product.astype(np.int64)
        return (np.clip(total, -(2**31), 2**31 - 1) if saturate else total).astype(np.uint32)
    if result != "f32":
        raise UnknownInstruction(f"accumulators of type {result} are not modelled")
    return (product + old.view(np.float32)).view(np.uint32)


def _add_half(m: Machine, product: Array, target: tuple, c: tuple, warps: Array) -> None:
    for i in range(2):
        old = np.ascontiguousarray(m.full_bits(c[i], 32).reshape(-1, WARP)[warps]).view(np.float16)
        old = old.reshape(len(warps), WARP, 2)
        places = [result_rows(2 * i + j) for j in range(2)]
        both = np.stack([product[:, row, column] + old[..., j] for j, (row, column) in enumerate(places)], -1)
        m.write(target[i], per_lane(m, both.astype(np.float16).view(np.uint32)[..., 0], warps))


def _matrix_rows(m: Machine, address: object, matrices: int, warps: Array) -> tuple[Array, Array]:
    """Byte positions and lanes of the rows that each warp's first 8 * matrices lanes point at."""
    rows = m.address(address).reshape(-1, WARP)[warps][:, : 8 * matrices]
    require_aligned(rows, 16)
    m.shared.check_range(rows, 16)
    lanes = (warps * WARP)[:, None] + np.arange(8 * matrices)
    if m.recorder:
        m.recorder.access("shared", rows.ravel(), lanes.ravel(), 16)
    return rows.astype(np.int64).ravel() + m.shared_base[lanes.ravel()], lanes.ravel()


def _transpose(words: Array) -> Array:
    """8 x 8 matrices of 16-bit elements, rows as four words [..., 32] -> transposed, laid out alike."""
    square = np.ascontiguousarray(words).view(np.uint16).reshape(*words.shape[:-1], 8, 8)
    return np.ascontiguousarray(square.swapaxes(-1, -2)).view(np.uint32).reshape(words.shape)


def _check_matrix_shape(ins: Instruction) -> None:
    if "m8n8" not in ins.modifiers or "b16" not in ins.modifiers:
        raise UnknownInstruction(f"matrix shape is not modelled: {ins.text}")


@opcode("ldmatrix")
def load_matrix(m: Machine, ins: Instruction) -> Wait | None:
    wait = whole_warp(m, "ldmatrix")
    if wait:
        return wait
    _check_matrix_shape(ins)
    registers, warps = ins.operands[0].items, m.whole_warps("ldmatrix") // WARP
    positions, lanes = _matrix_rows(m, ins.operands[1], len(registers), warps)
    if m.races:
        m.races.read(positions, 16, lanes)
    words = m.shared.load(positions, 32, 4, READABLE_BIT).reshape(len(warps), len(registers), WARP)
    if "trans" in ins.modifiers:
        words = _transpose(words)
    for i, register in enumerate(registers):
        m.write(register, per_lane(m, words[:, i], warps))
    return None


@opcode("stmatrix")
def store_matrix(m: Machine, ins: Instruction) -> Wait | None:
    wait = whole_warp(m, "stmatrix")
    if wait:
        return wait
    _check_matrix_shape(ins)
    registers, warps = ins.operands[1].items, m.whole_warps("stmatrix") // WARP
    positions, lanes = _matrix_rows(m, ins.operands[0], len(registers), warps)
    words = warp_words(m, registers, warps).transpose(0, 2, 1)
    if "trans" in ins.modifiers:
        words = _transpose(words)
    if m.races:
        m.races.write(positions, 16, lanes)
    m.shared.store(positions, 32, np.ascontiguousarray(words).reshape(-1, 4))
    return None
