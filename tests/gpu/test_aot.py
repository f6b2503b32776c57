"""Compiling without a GPU: what is read from the code, and that the gate stops each kind of bad build."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from pathlib import Path

import pytest
import triton

from gpu import samples
from limber_fast.kernels.catalogue import TARGETS, Case
from limber_fast.report.aot import compile_case, gate, rules, sass
from limber_fast.report.aot.chips import CHIPS, occupancy
from limber_fast.report.aot.offsets import narrow_offsets

FULL_RATE = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}
SMALL = {"num_warps": 4, "BLOCK_N": 64}
BUILDS = {"sm_80": samples.matmul(**SMALL), "sm_90": samples.matmul(), "sm_100": samples.matmul()}


@pytest.mark.parametrize("target", TARGETS)
def test_good_build_passes(target):
    build = compile_case(BUILDS[target], target)
    assert gate(BUILDS[target], target) == []
    assert 32 < build.registers <= 255 and build.threads == 32 * BUILDS[target].num_warps
    assert (build.stack, build.spill_loads, build.spill_stores) == (0, 0, 0)
    assert build.shared_static == 0 and 0 < build.shared_dynamic == build.metadata.shared
    assert set(build.tensor_core) == {FULL_RATE[target]}
    assert f".target {target}{'a' if target != 'sm_80' else ''}" in build.ptx
    assert set(build.async_copies) == {"LDGSTS"}


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_descriptors_use_the_tensor_memory_accelerator(target, on_host):
    case = samples.descriptor_matmul(on_host=on_host)
    assert gate(case, target) == []
    assert set(compile_case(case, target).async_copies) == {"UTMALDG"}


def test_equal_cases_compile_once():
    assert compile_case(samples.matmul("one"), "sm_90") is compile_case(samples.matmul("other"), "sm_90")
    assert compile_case(samples.matmul(), "sm_90") is not compile_case(samples.matmul(num_stages=2), "sm_90")


def test_case_that_leaves_out_an_argument_is_refused():
    case = dataclasses.replace(samples.matmul("forgetful"), signature={"a": "*bf16"}, divisible=("z",))
    with pytest.raises(ValueError, match=r"forgetful: no type or value for \['b', 'c', .*\]; .* \['z'\]"):
        compile_case(case, "sm_90")


# --- the gate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_gate_stops_an_oversized_tile(target):
    """Triton compiles it without a word; the launch would fail."""
    (failure, *_) = gate(samples.oversized(), target)
    assert f"bytes of shared memory; a block has {CHIPS[target].shared_per_block}" in failure


def test_gate_stops_spills():
    (failure,) = gate(samples.spilling(), "sm_90")
    assert failure.startswith("spilling on sm_90: spills: ")


def test_gate_stops_more_registers_than_there_are(monkeypatch):
    build = compile_case(BUILDS["sm_90"], "sm_90")
    monkeypatch.setattr(rules, "compile_case", lambda *_: dataclasses.replace(build, registers=257))
    (failure,) = gate(BUILDS["sm_90"], "sm_90")
    assert "257 registers in 256 threads" in failure


def test_gate_stops_products_without_tensor_cores():
    case = Case(samples.nested_kernel, "scalar", {"x": "*fp32", "out": "*fp32", "n": "i32"}, {"BLOCK": 128})
    assert gate(case, "sm_90") == []
    (failure,) = gate(dataclasses.replace(case, tensor_core=True), "sm_90")
    assert "expected HGMMA or IGMMA or QGMMA, none found" in failure


def test_gate_stops_the_older_tensor_core_instruction():
    (failure,) = gate(samples.matmul("two warps", num_warps=2, BLOCK_M=32, BLOCK_N=32), "sm_90")
    assert failure.endswith("found HMMA")  # a warp group is four warps


def test_gate_stops_32_bit_offsets():
    failures = gate(samples.narrow(), "sm_90")
    assert len(failures) == 3 and all("32-bit offset, a product of two runtime values" in line for line in failures)


# --- the rule on offsets --------------------------------------------------------------------------------------------

SIZES = {"n": "i32", "stride": "i32", "pid": "i32"}


def offset_ir(*lines: str) -> str:
    body = "\n".join(f"    {line} loc(#loc1)" for line in lines)
    return f"""module {{
  tt.func public @kernel(%x: !tt.ptr<f32> loc("x"(#loc)), %n: i32 loc("n"(#loc)), %stride: i32 loc("s"(#loc))) {{
    %c1 = arith.constant 1 : i32 loc(#loc1)
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


# --- reading the code -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_main_loop_holds_one_trip_of_the_product(target):
    build = compile_case(BUILDS[target], target)
    loop, once = sass.split_main_loop(build.instructions, (FULL_RATE[target],))
    tile = BUILDS[target].constants
    per_trip = 2 * tile["BLOCK_M"] * tile["BLOCK_N"] * tile["BLOCK_K"]
    assert sum(one.product_flops() for one in loop) * build.threads / 32 == per_trip
    assert not any(one.product_flops() for one in once)
    assert sum(build.opcodes.values()) == len(build.instructions) >= len(loop) + len(once)


def test_shortest_loop_counts_where_there_is_no_product():
    code = sass.parse(
        "\n".join(
            f"        /*{16 * place:04x}*/    {text} ;    /* 0x0 */"
            for place, text in enumerate(
                ["MOV R1, R2", *["FADD R1, R1, R2"] * 28, "@P0 BRA 0x10", *["FADD R1, R1, R2"] * 7, "@!P1 BRA 0x1e0",
                 "@P0 EXIT", "EXIT", *["MOV R1, R2"] * 9, "BRA 0x10"]
            )
        )
    )  # fmt: skip
    loop, once = sass.split_main_loop(code, ("HMMA",))
    assert sass.histogram(loop) == {"FADD": 7, "BRA": 1}
    assert sass.histogram(once) == {"MOV": 1, "FADD": 28, "BRA": 1, "EXIT": 2}


# --- occupancy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "registers", "shared", "threads", "blocks", "limiter"),
    [
        ("sm_90", 255, 98_328, 128, 2, "registers"),
        ("sm_90", 168, 98_328, 128, 2, "shared memory"),
        ("sm_90", 24, 0, 256, 8, "warps"),
        ("sm_90", 16, 0, 32, 32, "blocks"),
        ("sm_80", 128, 0, 256, 2, "registers"),
        ("sm_80", 32, 166_912, 128, 1, "shared memory"),
        ("sm_80", 32, 166_913, 128, 0, "shared memory"),
        ("sm_90", 255, 0, 512, 0, "registers"),
    ],
)
def test_occupancy(target, registers, shared, threads, blocks, limiter):
    found = occupancy(CHIPS[target], registers, shared, threads)
    assert (found.blocks, found.limiter, found.warps) == (blocks, limiter, blocks * threads // 32)


CALCULATOR = """
#include <cuda_occupancy.h>
#include <cstdio>
int main() {
  int capability, registers, shared, threads;
  while (std::scanf("%d %d %d %d", &capability, &registers, &shared, &threads) == 4) {
    cudaOccDeviceProp chip;
    chip.computeMajor = capability / 10, chip.computeMinor = capability % 10;
    chip.maxThreadsPerBlock = 1024, chip.maxThreadsPerMultiprocessor = 2048, chip.warpSize = 32;
    chip.regsPerBlock = chip.regsPerMultiprocessor = 65536;
    chip.sharedMemPerBlock = 49152, chip.reservedSharedMemPerBlock = 1024, chip.numSms = 100;
    chip.sharedMemPerMultiprocessor = capability >= 90 ? 233472 : 167936;
    chip.sharedMemPerBlockOptin = chip.sharedMemPerMultiprocessor - 1024;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = 1024, kernel.numRegs = registers;
    kernel.sharedSizeBytes = 0, kernel.numBlockBarriers = 1;
    kernel.partitionedGCConfig = PARTITIONED_GC_OFF, kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.maxDynamicSharedSizeBytes = chip.sharedMemPerBlockOptin;
    cudaOccDeviceState state;
    state.cacheConfig = CACHE_PREFER_SHARED;
    cudaOccResult result;
    auto error = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &chip, &kernel, &state, threads, shared);
    std::printf("%d\\n", error ? -1 : result.activeBlocksPerMultiprocessor);
  }
}
"""


def test_occupancy_agrees_with_cudas_own_header(tmp_path):
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    compiler = shutil.which("g++")
    if compiler is None or not (headers / "cuda_occupancy.h").exists():
        pytest.skip("needs g++, and the header that Triton's wheel carries")
    (tmp_path / "occupancy.cpp").write_text(CALCULATOR)
    program = tmp_path / "occupancy"
    subprocess.run([compiler, f"-I{headers}", tmp_path / "occupancy.cpp", "-o", program], check=True, timeout=120)
    questions = [
        (target, registers, shared, threads)
        for target in ("sm_80", "sm_90")
        for registers in (16, 33, 64, 128, 168, 255)
        for shared in (0, 1000, 49_152, 65_536, 98_328, 160_000)
        for threads in (32, 64, 96, 128, 256, 512, 1024)
    ]
    asked = "\n".join(f"{CHIPS[target].capability} {r} {s} {t}" for target, r, s, t in questions)
    done = subprocess.run([program], input=asked, capture_output=True, text=True, check=True, timeout=60)
    ours = [occupancy(CHIPS[target], r, s, t).blocks for target, r, s, t in questions]
    assert ours == [int(line) for line in done.stdout.split()]
