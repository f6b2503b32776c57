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

FULL_RATE = {"sm_80": "HMMA", "sm_89": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}
SMALL = {"num_warps": 4, "BLOCK_N": 64}
BUILDS = {target: samples.matmul(**SMALL if target.startswith("sm_8") else {}) for target in TARGETS}


@pytest.mark.parametrize("target", TARGETS)
def test_good_build_passes(target):
    build = compile_case(BUILDS[target], target)
    assert gate(BUILDS[target], target) == []
    assert 32 < build.registers <= 255 and build.threads == 32 * BUILDS[target].num_warps
    assert (build.stack, build.spill_loads, build.spill_stores) == (0, 0, 0)
    assert build.shared_static == 0 and 0 < build.shared_dynamic == build.metadata.shared
    assert set(build.tensor_core) == {FULL_RATE[target]}
    assert f".target {target}{'' if target.startswith('sm_8') else 'a'}" in build.ptx
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


# --- reading the code -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_main_loop_holds_one_trip_of_the_product(target):
    build = compile_case(BUILDS[target], target)
    code = sass.sections(build.instructions, (FULL_RATE[target],))
    tile = BUILDS[target].constants
    per_trip = 2 * tile["BLOCK_M"] * tile["BLOCK_N"] * tile["BLOCK_K"]
    assert sum(one.product_flops() for one in code.main) * build.threads / 32 == per_trip
    assert not code.around and not any(one.product_flops() for one in code.once)
    assert sum(build.opcodes.values()) == len(build.instructions) >= len(code.main) + len(code.once)


def listing(*lines: str) -> tuple[sass.Instruction, ...]:
    return sass.parse(
        "\n".join(f"        /*{16 * place:04x}*/    {line} ;   /* 0x0 */" for place, line in enumerate(lines))
    )


def test_loop_around_the_main_loop_is_found():
    """One that polls a barrier is none, and neither is the way back from code behind the exit."""
    code = sass.sections(
        listing(
            "MOV R1, R2", *["FMUL R1, R1, R2"] * 2, "@!P0 BRA 0x20", "MUFU.EX2 R1, R1", *["HMMA.16816.F32 R0, R4"] * 6,
            "@P1 BRA 0x50", *["FADD R1, R1, R2"] * 9, "BRA 0x10", "EXIT", "SYNCS R1", "BRA 0x50",
        ),
        ("HMMA",),
    )  # fmt: skip
    assert sass.histogram(code.main) == {"HMMA": 6, "BRA": 1}
    assert sass.histogram(code.around) == {"FMUL": 2, "MUFU": 1, "FADD": 9, "BRA": 2}
    assert sass.histogram(code.once) == {"MOV": 1, "EXIT": 1}


def test_loops_around_the_main_loop_count_by_themselves():
    """The loop around it, which has two ways back, and the one around that; the program ends at its first exit."""
    products = ["HMMA.16816.F32 R0, R4"] * 6
    code = sass.sections(
        listing(
            "MOV R1, R2", "MUFU.EX2 R1, R1", "FMUL R1, R1, R2", *products, "@P0 BRA 0x30", "@P1 BRA 0x20",
            "@P2 BRA 0x20", "FADD R1, R1, R2", "@P3 BRA 0x10", "EXIT", *["SHFL R1, R2"] * 9, "EXIT",
        ),
        ("HMMA",),
    )  # fmt: skip
    assert sass.histogram(code.main) == {"HMMA": 6, "BRA": 1}
    assert sass.histogram(code.around) == {"FMUL": 1, "BRA": 1}
    assert sass.histogram(code.beyond) == {"MUFU": 1, "BRA": 2, "FADD": 1}
    assert sass.histogram(code.once) == {"MOV": 1, "EXIT": 1}


def test_branches_are_taken_past_what_they_skip():
    """But not past the main loop; a predicate among the operands makes a branch a choice, too."""
    code = listing(
        "MOV R1, R2", "@P0 BRA 0x40", *["FMUL R1, R1, R2"] * 2, *["HMMA.16816.F32 R0, R4"] * 6, "@P1 BRA 0x40",
        "BRA P2, 0xe0", "MUFU.EX2 R1, R1", "BRA 0xf0", "FADD R1, R1, R2", "@P3 EXIT", "BRA 0x0", "SYNCS R1", "BRA 0x40",
    )  # fmt: skip
    found = sass.sections(code, ("HMMA",))
    assert sass.histogram(found.main) == {"HMMA": 6, "BRA": 1}
    assert sass.histogram(found.around) == {"MOV": 1, "BRA": 3, "FADD": 1, "EXIT": 1}
    assert found.once == ()
    assert sass.sections(code, ("HMMA",), idle=True).main == ()


def test_no_way_means_all_of_it():
    assert len(sass.shortest_way(listing("MOV R1, R2", "BRA 0x50", "MOV R1, R2"))) == 3


def test_shortest_loop_counts_where_there_is_no_product():
    unrolled, single = ["FADD R1, R1, R2"] * 28, ["FADD R1, R1, R2"] * 7
    code = sass.sections(
        listing("MOV R1, R2", *unrolled, "@P0 BRA 0x10", *single, "@!P1 BRA 0x1e0", "@P0 EXIT", "EXIT", "MOV R1, R2"),
        ("HMMA",),
    )
    assert sass.histogram(code.main) == {"FADD": 7, "BRA": 1}
    assert sass.histogram(code.once) == {"MOV": 1, "FADD": 28, "BRA": 1, "EXIT": 2}


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
        ("sm_89", 32, 101_376, 128, 1, "shared memory"),
        ("sm_89", 32, 101_377, 128, 0, "shared memory"),
        ("sm_89", 32, 0, 256, 6, "warps"),
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
    chip.maxThreadsPerBlock = 1024, chip.maxThreadsPerMultiprocessor = capability == 89 ? 1536 : 2048;
    chip.warpSize = 32;
    chip.regsPerBlock = chip.regsPerMultiprocessor = 65536;
    chip.sharedMemPerBlock = 49152, chip.reservedSharedMemPerBlock = 1024, chip.numSms = 100;
    chip.sharedMemPerMultiprocessor = capability >= 90 ? 233472 : capability == 89 ? 102400 : 167936;
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
        for target in ("sm_80", "sm_89", "sm_90")
        for registers in (16, 33, 64, 128, 168, 255)
        for shared in (0, 1000, 49_152, 65_536, 98_328, 160_000)
        for threads in (32, 64, 96, 128, 256, 512, 1024)
    ]
    asked = "\n".join(f"{CHIPS[target].capability} {r} {s} {t}" for target, r, s, t in questions)
    done = subprocess.run([program], input=asked, capture_output=True, text=True, check=True, timeout=60)
    ours = [occupancy(CHIPS[target], r, s, t).blocks for target, r, s, t in questions]
    assert ours == [int(line) for line in done.stdout.split()]
