"""The rule on 32-bit offsets: which products of Triton IR it lets through, and which it names."""

from __future__ import annotations

import pytest

from limber_fast.report.aot.offsets import narrow_offsets


def offset_ir(*lines: str) -> str:
    body = "\n".join(f"    {line} loc(#loc1)" for line in lines)
    return f"""module {{
  tt.func public @kernel(%x: !tt.ptr<f32> loc("x"(#loc)), %n: i32 loc("n"(#loc)), %stride: i32 loc("s"(#loc))) {{
    %c1 = arith.constant 1 : i32 loc(#loc1)
    %c8 = arith.constant 8 : i32 loc(#loc1)
    %c128 = arith.constant 128 : i32 loc(#loc1)
    %c8192 = arith.constant 8192 : i32 loc(#loc1)
    %pid = tt.get_program_id x : i32 loc(#loc1)
    %tile = tt.make_range {{end = 128 : i32, start = 0 : i32}} : tensor<128xi32> loc(#loc1)
{body}
  }}
}}
"""


FIRST_ROW = ("%row = arith.muli %pid, %c128 : i32", "%rows = arith.addi %row, %tile : tensor<128xi32>")
ADDRESS = "%at = tt.addptr %x, %off : !tt.ptr<f32>, i32"
SOUND = {
    "first row of a block": (*FIRST_ROW, "%at = tt.addptr %x, %rows : !tt.ptr<f32>, i32"),
    "pitch of a tile": ("%off = arith.muli %tile, %stride : tensor<128xi32>", ADDRESS),
    "step of a loop": ("%off = arith.muli %stride, %c128 : i32", ADDRESS),
    "64 bits": (
        *FIRST_ROW,
        "%wide = arith.extsi %rows : tensor<128xi32> to tensor<128xi64>",
        "%off = arith.muli %wide, %wide : tensor<128xi64>",
        ADDRESS,
    ),
    "product that is no offset": (
        "%other = arith.muli %pid, %stride : i32",
        "%off = arith.addi %pid, %n : i32",
        ADDRESS,
    ),
    "block number of a quotient": (
        "%group = arith.muli %n, %c128 : i32",
        "%block = arith.divsi %pid, %group : i32",
        "%off = arith.muli %block, %c128 : i32",
        ADDRESS,
    ),
    "first block of a group": (
        "%group = arith.divsi %pid, %n : i32",
        "%first = arith.muli %group, %c8 : i32",
        "%inside = arith.remsi %pid, %c8 : i32",
        "%block = arith.addi %first, %inside : i32",
        "%off = arith.muli %block, %c128 : i32",
        ADDRESS,
    ),
    "number of blocks as a bound": (
        "%blocks = arith.muli %n, %stride : i32",
        "scf.for %i = %pid to %blocks step %n  : i32 {",
        "%off = arith.muli %i, %c128 : i32",
        ADDRESS,
        "}",
    ),
    "loop over blocks": ("scf.for %i = %c1 to %n step %c1  : i32 {", "%off = arith.muli %i, %c128 : i32", ADDRESS, "}"),
    "loop of constants": (
        "scf.for %i = %c1 to %c8192 step %c128  : i32 {",
        "%off = arith.muli %i, %c128 : i32",
        ADDRESS,
        "}",
    ),
}
UNSOUND = {
    "row times stride": (*FIRST_ROW, "%off = arith.muli %rows, %stride : tensor<128xi32>", ADDRESS),
    "program times stride": ("%off = arith.muli %pid, %stride : i32", ADDRESS),
    "widened too late": (
        "%product = arith.muli %pid, %stride : i32",
        "%off = arith.extsi %product : i32 to i64",
        ADDRESS,
    ),
    "row times a constant pitch": (*FIRST_ROW, "%off = arith.muli %rows, %c128 : tensor<128xi32>", ADDRESS),
    "block times a whole tile": ("%off = arith.muli %pid, %c8192 : i32", ADDRESS),
    "loaded row": ("%id = tt.load %x : !tt.ptr<i32>", "%off = arith.muli %id, %c128 : i32", ADDRESS),
    "loop over rows": ("scf.for %i = %c1 to %n step %c128  : i32 {", "%off = arith.muli %i, %c128 : i32", ADDRESS, "}"),
    "row that a loop advances": (
        "%end = scf.for %i = %c1 to %n step %c1 iter_args(%here = %c1) -> (i32)  : i32 {",
        "%next = arith.addi %here, %c128 : i32",
        "%off = arith.muli %here, %c128 : i32",
        ADDRESS,
        "scf.yield %next : i32",
        "}",
    ),
    "choice of a branch": (
        "%off = scf.if %n -> (i32) {",
        "%bad = arith.muli %pid, %stride : i32",
        "scf.yield %bad : i32",
        "} else {",
        "scf.yield %c1 : i32",
        "}",
        ADDRESS,
    ),
}


@pytest.mark.parametrize("name", SOUND)
def test_offsets_that_cannot_overflow_pass(name):
    assert narrow_offsets(offset_ir(*SOUND[name])) == []


@pytest.mark.parametrize("name", UNSOUND)
def test_offsets_that_can_overflow_are_named(name):
    (failure,) = narrow_offsets(offset_ir(*UNSOUND[name]))
    assert failure.startswith("32-bit offset, ") and "arith.muli" in failure
