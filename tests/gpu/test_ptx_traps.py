"""What the executor stops at, each shown on a kernel broken for the purpose."""

from __future__ import annotations

import re

import pytest
import torch
import triton

from gpu import samples
from gpu.ptx import PtxTrap, UnknownInstruction, execute
from gpu.ptx.launch import run_case
from gpu.ptx_sources import TILE, handwritten, matmul_problem, run_by_hand
from limber_fast.kernels.catalogue import Case
from limber_fast.report.aot import compile_case

MATMUL = samples.matmul(num_warps=4, **TILE)
DESCRIPTORS = samples.descriptor_matmul(on_host=False)


def run_edited(case: Case, target: str, pattern: str, replacement: str = "", *, races: bool = False) -> None:
    """Run a matmul sample with every match of `pattern` in its PTX replaced."""
    text, found = re.subn(pattern, replacement, compile_case(case, target).ptx, flags=re.M)
    assert found, f"nothing in the PTX matches {pattern}"
    arguments, _ = matmul_problem(136, 136, 160, torch.bfloat16)
    grid = (2, 2) if case is DESCRIPTORS else (3, 3)
    run_case(case, target, grid, arguments, ptx=text, races=races)


def test_out_of_bounds():
    """Per tensor: the neighbour in memory is no excuse."""
    signature = {"x": "*fp32", "out": "*fp32", "n": "i32"}
    constants = {"BLOCK": 128, "LOAD_MASK": False, "STORE_MASK": True}
    case = Case(samples.copy_kernel, "copy", signature, constants)
    both = torch.zeros(2000)
    with pytest.raises(
        PtxTrap, match=r"out-of-bounds global access: 28 lanes.* byte 400 of tensor 0 \[100\].*ld\.global"
    ):
        run_case(case, "sm_80", (1,), {"x": both[:100], "out": both[1000:1100], "n": 100})


def test_between_rows():
    """Of a matrix that is part of a wider one."""
    matrix = torch.zeros(4, 8)[:, :6]
    run_by_hand("ld.global.v2.b32 {%r1, %r2}, [%d0+48];", [matrix])
    with pytest.raises(PtxTrap, match="access of 8 bytes past the 24 of a row of tensor 0"):
        run_by_hand("ld.global.v2.b32 {%r1, %r2}, [%d0+24];", [matrix])


def test_misaligned_access():
    with pytest.raises(PtxTrap, match="misaligned access: 8 bytes"):
        run_by_hand("ld.global.v2.b32 {%r1, %r2}, [%d0+4];", [torch.zeros(8)])


def test_shared_memory_out_of_range():
    with pytest.raises(PtxTrap, match="shared memory out of range: 4 bytes at 124, the block has 124"):
        run_by_hand(
            "mov.u32 %r1, tile;\nshl.b32 %r2, %r0, 2;\nadd.s32 %r1, %r1, %r2;\nst.shared.b32 [%r1], %r0;",
            [],
            shared=124,
        )


def test_unwritten_shared_memory():
    with pytest.raises(PtxTrap, match="at byte 0 before anything was written there"):
        run_by_hand("ld.shared.b32 %r1, [tile];", [], shared=128)


def test_unwritten_register():
    with pytest.raises(PtxTrap, match="register %r2 is read before it is written"):
        run_by_hand("add.s32 %r1, %r0, %r2;", [])


@pytest.mark.parametrize(
    "use",
    ["st.shared.b32 [tile], %r3;", "ld.shared.b32 %r4, [%r3];", "setp.eq.s32 %p2, %r3, 1;\n@%p2 bra end;\nend:"],
    ids=["stored", "address", "branch"],
)
def test_undefined_lanes(use):
    """They may be computed with, as compilers do in lanes that nobody stores, but not used."""
    start = "setp.lt.u32 %p1, %r0, 8;\n@%p1 mov.u32 %r2, 1;\nadd.s32 %r3, %r0, %r2;\n"
    run_by_hand(start, [], shared=128)
    run_by_hand(start + "selp.b32 %r3, %r3, 0, %p1;\nst.shared.b32 [tile], %r3;", [], shared=128)
    run_by_hand(start + "shfl.sync.idx.b32 %r3, %r3, 2, 31, -1;\nst.shared.b32 [tile], %r3;", [], shared=128)
    with pytest.raises(PtxTrap, match=r"register %[rp][23] is used in a lane where it is undefined"):
        run_by_hand(start + use, [], shared=128)


def test_undefined_by_the_compilers_own_word_is_no_trap():
    run_by_hand("// implicit-def: %r2\nadd.s32 %r1, %r0, %r2;", [])


def test_copy_read_before_its_wait():
    with pytest.raises(PtxTrap, match=r"before the wait for the asynchronous copy.*ldmatrix"):
        run_edited(MATMUL, "sm_80", r"^\s*cp\.async\.wait_group.*$")
    with pytest.raises(PtxTrap, match="before the wait for the asynchronous copy"):
        run_edited(MATMUL, "sm_80", r"cp\.async\.wait_group\s+\d+;", "cp.async.wait_group 9;")


def test_missing_barrier():
    with pytest.raises(PtxTrap, match="race in shared memory"):
        run_edited(MATMUL, "sm_80", r"^\s*bar\.sync.*$", races=True)


def exchange(distance: int, first: str, second: str) -> None:
    """Every thread writes a word, reads the one `distance` bytes away, and overwrites its own."""
    body = f"""
    shl.b32 %r1, %r0, 2;
    mov.u32 %r2, tile;
    add.s32 %r3, %r2, %r1;
    st.shared.b32 [%r3], %r0;
    {first}
    xor.b32 %r4, %r1, {distance};
    add.s32 %r4, %r2, %r4;
    ld.shared.b32 %r5, [%r4];
    {second}
    st.shared.b32 [%r3], %r5;
    """
    run_by_hand(body, [], threads=64, shared=256, races=True)


def test_write_after_read_without_barrier():
    exchange(128, "bar.sync 0;", "bar.sync 0;")
    with pytest.raises(PtxTrap, match="a write that no barrier orders after a read"):
        exchange(128, "bar.sync 0;", "")


def test_race_between_lanes_of_a_warp():
    barrier = "bar.warp.sync -1;"
    exchange(4, barrier, barrier)
    for first, second, what in (("", barrier, "read"), (barrier, "", "write")):
        with pytest.raises(PtxTrap, match=f"a {what} that no barrier of the warp orders"):
            exchange(4, first, second)


def test_race_between_blocks():
    neighbour = Case(samples.neighbour_kernel, "neighbour", {"x": "*fp32"})
    with pytest.raises(PtxTrap, match=r"race in tensor 0 \[9\] at byte 4: a write after a read by another block"):
        run_case(neighbour, "sm_80", (8,), {"x": torch.zeros(9)}, races=True)


def test_race_between_warps_in_global_memory():
    exchange = """
    mul.wide.u32 %d1, %r0, 4;
    add.s64 %d2, %d0, %d1;
    st.global.b32 [%d2], %r0;
    {barrier}
    xor.b64 %d3, %d1, 128;
    add.s64 %d3, %d0, %d3;
    ld.global.b32 %r1, [%d3];
    """
    memory = torch.zeros(64, dtype=torch.int32)
    run_by_hand(exchange.format(barrier="bar.sync 0;"), [memory], threads=64, races=True)
    with pytest.raises(PtxTrap, match="a read after a write by another warp, without a barrier between"):
        run_by_hand(exchange.format(barrier=""), [memory], threads=64, races=True)


def test_race_of_two_warps_in_one_instruction():
    """Within a warp the hardware takes one of the values; nothing orders warps."""
    write = "st.global.b32 [%d0], %r0;"
    run_by_hand(write, [torch.zeros(1, dtype=torch.int32)], races=True)
    with pytest.raises(PtxTrap, match=r"race in tensor 0 \[1\] at byte 0: two warps write it in one instruction"):
        run_by_hand(write, [torch.zeros(1, dtype=torch.int32)], threads=64, races=True)


def test_atomics_do_not_race():
    body = "atom.shared.add.u32 %r1, [tile], 1;\nred.global.add.u32 [%d0], 1;"
    start = "setp.eq.u32 %p1, %r0, 0;\n@%p1 st.shared.b32 [tile], 0;\nbar.sync 0;\n"
    memory = torch.zeros(1, dtype=torch.int32)
    run_by_hand(start + body, [memory], threads=64, shared=16, races=True)
    assert memory.item() == 64


def test_kernel_that_ends_with_a_copy_under_way():
    with pytest.raises(PtxTrap, match="ends while a bulk copy is still reading shared memory"):
        run_edited(DESCRIPTORS, "sm_90", r"^.*cp\.async\.bulk\.wait_group.*$")


def test_bulk_copy_without_wait():
    with pytest.raises(PtxTrap, match="before the wait for the asynchronous copy"):
        run_edited(DESCRIPTORS, "sm_90", r"mbarrier\.try_wait.* complete, .*;", "setp.eq.u32 complete, 0, 0;")


def test_mbarrier_that_never_completes():
    with pytest.raises(PtxTrap, match=r"would hang: .* an mbarrier whose phase is never complete .*bytes missing"):
        run_edited(DESCRIPTORS, "sm_90", r"(mbarrier\.arrive\.expect_tx.*), \d+;", r"\1, 40000;")


def test_wgmma_without_wait():
    with pytest.raises(PtxTrap, match="while a wgmma is writing it"):
        run_edited(DESCRIPTORS, "sm_90", r"^\s*wgmma\.wait_group.*$")


def test_wgmma_without_fence():
    with pytest.raises(PtxTrap, match=r"written after the last wgmma\.fence"):
        run_edited(DESCRIPTORS, "sm_90", r"^\s*wgmma\.fence.*$")


def test_missing_proxy_fence():
    with pytest.raises(PtxTrap, match=r"without fence\.proxy\.async"):
        run_edited(DESCRIPTORS, "sm_90", r"^\s*fence\.proxy\.async.*$")
    if triton.__version__ < "3.8":
        return  # leaves this fence out by itself
    with pytest.raises(PtxTrap, match=r"by the asynchronous proxy without fence\.proxy\.async.*wgmma"):
        run_edited(MATMUL, "sm_90", r"^\s*fence\.proxy\.async.*$")


def test_tensor_map_that_nobody_acquired():
    with pytest.raises(PtxTrap, match=r"before fence\.proxy\.tensormap"):
        run_edited(DESCRIPTORS, "sm_90", r"^.*fence\.proxy\.tensormap.*$")


def test_incomplete_tensor_map():
    with pytest.raises(PtxTrap, match="a tensor map without box_dim"):
        run_edited(DESCRIPTORS, "sm_90", r"^.*tensormap\.replace\.tile\.box_dim.*$")


def test_barrier_that_not_all_threads_reach():
    body = "setp.lt.u32 %p1, %r0, 32;\n@%p1 bar.sync 1, 64;"
    with pytest.raises(PtxTrap, match=r"would hang: 32 threads .* barrier 1, which not all threads"):
        run_by_hand(body, [], threads=64)


def test_shuffle_that_half_a_warp_reaches():
    body = "setp.lt.u32 %p1, %r0, 16;\n@!%p1 bra done;\nshfl.sync.idx.b32 %r1, %r0, 0, 31, -1;\ndone:"
    with pytest.raises(PtxTrap, match=r"would hang: .* shfl\.sync that not all lanes of its mask reach"):
        run_by_hand(body + "\nbar.sync 0;", [])


def test_endless_loop():
    with pytest.raises(PtxTrap, match="no end after 1000 instructions"):
        run_by_hand("again:\nadd.s32 %r0, %r0, 1;\nbra again;", [], max_instructions=1000)


def test_device_assertion():
    with pytest.raises(PtxTrap, match="the kernel stopped itself"):
        run_by_hand("trap;", [])


@pytest.mark.parametrize("line", ["frobnicate.b32 %r1, %r0;", "add.rz.f32 %r1, %r0, %r0;", "mma.sp.sync.foo.f32 %r1;"])
def test_unknown_instruction_is_named(line):
    with pytest.raises(UnknownInstruction, match=re.escape(line.rstrip(";"))):
        run_by_hand(line, [])


def test_wrong_number_of_arguments():
    with pytest.raises(ValueError, match="kernel has 1 parameters; got 3 arguments"):
        execute(handwritten(""), (1,), (32,), [0, 0, 0])
