"""The mutation score itself, and what it says about checks of compiled kernels."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from gpu import samples
from gpu.ptx import execute
from gpu.ptx.equivalence import droppable_lines, equivalent_lines
from gpu.ptx.launch import run_case
from gpu.ptx.mutate import Mutant, mutants, mutation_score, sample
from gpu.ptx.parse import parse
from gpu.ptx_sources import TILE, handwritten, int8_matmul, matmul_problem, relative_error, softmax
from limber_fast.kernels.catalogue import Case
from limber_fast.report.aot import compile_case

GOAL = 0.85
MATMUL = samples.matmul(num_warps=4, **TILE)
DESCRIPTORS = samples.descriptor_matmul(on_host=False)


def matmul_verdict(case: Case, target: str, shapes: list[tuple[int, int, int]]) -> Callable[[str], bool]:
    """Ragged tiles, a single tile, and an empty product, which leaves the main loop out."""
    tile_m, tile_n = case.constants["BLOCK_M"], case.constants["BLOCK_N"]

    def verdict(ptx: str) -> bool:
        for M, N, K in shapes:
            arguments, exact = matmul_problem(M, N, K, torch.bfloat16)
            grid = (-(-M // tile_m), -(-N // tile_n))
            run_case(case, target, grid, arguments, ptx=ptx, races=True, max_instructions=6000)
            right = relative_error(arguments["c"], exact) < 2e-3 if K else not arguments["c"].any()
            if not right:
                return False
        return True

    return verdict


def softmax_verdict(target: str) -> Callable[[str], bool]:
    x = 8 * torch.randn(3, 512, generator=torch.Generator().manual_seed(0))
    x[1, 17] = x[1].max() + 30
    x = x.bfloat16()

    def verdict(ptx: str) -> bool:
        for columns in (333, 2, 512):
            part = x[:, :columns].contiguous()
            out = torch.full((3, columns), torch.nan)
            arguments = {"x": part, "out": out, "N": columns, "stride": columns}
            run_case(softmax, target, (3,), arguments, ptx=ptx, races=True, max_instructions=3000)
            if not torch.allclose(out.double(), part.double().softmax(1), rtol=2e-6, atol=1e-9):
                return False
        return True

    return verdict


def int8_verdict(target: str) -> Callable[[str], bool]:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-128, 128, (128, 192), generator=generator, dtype=torch.int8) for _ in range(2))

    def verdict(ptx: str) -> bool:
        for K in (192, 64, 0):
            c = torch.full((128, 128), -1, dtype=torch.int32)
            arguments = {"a": a, "b": b, "c": c, "K": K, "stride_a": 192, "stride_b": 192, "stride_c": 128}
            run_case(int8_matmul, target, (2, 2), arguments, ptx=ptx, races=True, max_instructions=6000)
            if not torch.equal(c, a[:, :K].int() @ b[:, :K].int().T):
                return False
        return True

    return verdict


def test_checks_of_a_product_notice_mutants():
    shapes = [(136, 136, 112), (64, 64, 0)]
    score = mutation_score(compile_case(MATMUL, "sm_80").ptx, matmul_verdict(MATMUL, "sm_80", shapes), count=18, seed=3)
    assert score.total == 18 and score.rate >= GOAL, score.report()
    assert re.match(r"1\d of 18 mutants noticed", score.report())
    assert set(score.by_kind) == {
        "dropped", "dropped synchronisation", "constant", "operator", "swapped operands", "guard",
    }  # fmt: skip


@pytest.mark.slow_gpu
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", ["matmul", "descriptors", "softmax", "int8"])
def test_score_of_the_samples(name, target):
    if name == "descriptors" and target == "sm_80":
        pytest.skip("sm_80 has no tensor memory accelerator")
    case = {"matmul": MATMUL, "descriptors": DESCRIPTORS, "softmax": softmax, "int8": int8_matmul}[name]
    verdict = {
        "matmul": lambda: matmul_verdict(case, target, [(136, 136, 112), (64, 64, 0), (65, 24, 32), (64, 64, 64)]),
        "descriptors": lambda: matmul_verdict(case, target, [(200, 136, 200), (128, 128, 64), (128, 128, 0)]),
        "softmax": lambda: softmax_verdict(target),
        "int8": lambda: int8_verdict(target),
    }[name]()
    score = mutation_score(compile_case(case, target).ptx, verdict, count=100, race_checked=True)
    print(f"\n{name} {target}: {score.report()}")
    assert score.rate >= GOAL, score.report()


def test_a_sample_is_reproducible_and_mixed():
    text = compile_case(MATMUL, "sm_80").ptx
    chosen = sample(text, 30, seed=5)
    assert chosen == sample(text, 30, seed=5) != sample(text, 30, seed=6)
    kinds = [m.kind for m in chosen]
    assert max(map(kinds.count, kinds)) - min(map(kinds.count, set(kinds))) <= 1
    assert all(m.apply(text).count("\n") == text.count("\n") for m in chosen)


def test_a_blind_check_scores_nothing():
    score = mutation_score(handwritten("add.s32 %r1, %r0, 1;\nst.global.b32 [%d0], %r1;"), lambda ptx: True, count=4)
    assert score.rate == 0 and len(score.survived) == 4 and "survived: line" in score.report()


def test_unneeded_barriers_are_findings():
    """The first barrier orders nothing, the second orders the exchange."""
    text = handwritten(
        """
        bar.sync 0;
        shl.b32 %r1, %r0, 2;
        st.shared.b32 [%r1], %r0;
        bar.sync 0;
        xor.b32 %r2, %r1, 128;
        ld.shared.b32 %r3, [%r2];
        cvt.u64.u32 %d1, %r1;
        add.s64 %d2, %d0, %d1;
        st.global.b32 [%d2], %r3;
        """,
        shared=256,
    )

    def verdict(ptx: str) -> bool:
        out = torch.full((64,), -1, dtype=torch.int32)
        execute(ptx, (1,), (64,), [out], races=True)
        return out.tolist() == [i ^ 32 for i in range(64)]

    score = mutation_score(text, verdict, count=1000, race_checked=True)
    assert len(score.unneeded_barriers) == 1 and score.by_kind["dropped synchronisation"] == {"killed": 1}
    assert score.rate >= GOAL, score.report()
    uncounted = mutation_score(text, verdict, count=1000)
    assert uncounted.total == score.total + 1 and not uncounted.unneeded_barriers


def test_a_check_that_rejects_the_kernel_itself_is_refused():
    with pytest.raises(ValueError, match="verdict rejects the kernel as it is"):
        mutation_score(handwritten(""), lambda ptx: False)


def reasons(body: str) -> dict[str, str]:
    """Statement -> why it is left out."""
    text = handwritten(body)
    lines, kernel = text.split("\n"), parse(text)
    return {lines[n]: r for n, r in (droppable_lines(kernel) | equivalent_lines(kernel)).items()}


def test_equivalent_changes_are_found():
    found = reasons(
        """
        mov.b32 %r1, 0;
        setp.eq.u32 %p1, %r0, 7;
        @%p1 bra skip;
mov.b32 %r1, 0;
add.s32 %r9, %r0, 1;
mul.lo.s32 %r10, %r9, 3;
bar.sync 0;
add.s32 %r1, %r1, %r0;
bar.sync 0;
prefetch.global.L2 [%d0];
cp.async.wait_group 0;
        skip:
        st.global.b32 [%d0], %r1;
        """
    )
    assert found == {
        "mov.b32 %r1, 0;": "the register holds this constant already",
        "add.s32 %r9, %r0, 1;": "its result is not needed",
        "mul.lo.s32 %r10, %r9, 3;": "its result is not needed",
        "bar.sync 0;": "its equal is next to it",
        "prefetch.global.L2 [%d0];": "hint",
        "cp.async.wait_group 0;": "there is nothing to wait for",
    }


def test_needed_lines_are_not_left_out():
    """A loop-carried value, a constant that only one path sets, a barrier between a store and a load."""
    body = """
    @%p1 bra skip;
    mov.b32 %r1, 0;
    skip:
    mov.b32 %r1, 0;
    mov.b32 %r2, 1;
    again:
    add.s32 %r3, %r2, %r1;
    mov.b32 %r2, 0;
    bar.sync 0;
    ld.global.b32 %r4, [%d0];
    bar.sync 0;
    add.s32 %r1, %r3, %r4;
    setp.lt.s32 %p1, %r1, 9;
    @%p1 bra again;
    st.global.b32 [%d0], %r3;
    """
    body = "setp.eq.u32 %p1, %r0, 7;\n" + body
    found = reasons(body)
    assert {r for r in found.values()} <= {"its result is not needed"} and len(found) == 1, found


def test_left_out_changes_make_no_difference():
    """Every excluded mutant of a compiled kernel really gives the same bits."""
    case, target = DESCRIPTORS, "sm_90"
    text = compile_case(case, target).ptx
    _, excluded = mutants(text)
    by_reason: dict[str, Mutant] = {reason: mutant for mutant, reason in excluded}
    results = []
    for changed in [text, *(m.apply(text) for m in by_reason.values())]:
        arguments, _ = matmul_problem(136, 136, 128, torch.bfloat16)
        run_case(case, target, (2, 2), arguments, ptx=changed, races=True)
        results.append(arguments["c"])
    assert len(results) > 3 and all(torch.equal(results[0], r) for r in results[1:])


def test_what_no_check_sees_may_be_named_by_its_source():
    text = compile_case(DESCRIPTORS, "sm_90").ptx
    (before, _), (after, excluded) = mutants(text), mutants(text, unobservable={r"// c\.store\(": "stores"})
    stores = [m.before for m, reason in excluded if reason == "stores"]
    assert len(before) - len(after) == len(stores) > 0 and any("cvt.rn.bf16x2" in line for line in stores)
    assert not any("mma_async" in line for line in stores)


@pytest.mark.parametrize(
    ("line", "change"),
    [
        ("setp.lt.s32 %p1, %r0, 5;", "setp.ge.s32 %p1, %r0, 5;"),
        ("setp.lt.s32 %p1, %r0, 5;", "setp.lt.s32 %p1, %r0, 6;"),
        ("sub.s32 %r1, %r0, %r2;", "sub.s32 %r1, %r2, %r0;"),
        ("@%p1 st.global.b32 [%d0+16], %r0;", "@!%p1 st.global.b32 [%d0+16], %r0;"),
        ("mov.b32 %r1, 0f00000000;", "mov.b32 %r1, 0f3F800000;"),
        ("shr.u32 %r1, %r0, 5;", "shl.b32 %r1, %r0, 5;"),
        ("cp.async.wait_group 2;", "cp.async.wait_group 3;"),
        ("prmt.b32 %r1, %r0, 0, 0x7773U;", "prmt.b32 %r1, %r0, -1, 0x7773U;"),
        ("prmt.b32 %r1, %r0, 0, 0x7773U;", "prmt.b32 %r1, %r0, 0, 30580U;"),
        ("bar.sync 0;", ""),
    ],
)
def test_changes(line, change):
    """Which changes a line gives; every result is read, every wait has something to wait for."""
    needs = (
        "".join(f"st.global.b32 [%d0], %r{i};\n" for i in (1, 2))
        + "selp.b32 %r3, 1, 0, %p1;\nst.global.b32 [%d0], %r3;"
    )
    text = handwritten(f"cp.async.ca.shared.global [%r5], [%d0], 4;\nst.global.b32 [%d0], %r0;\n{line}\n{needs}")
    counted, _ = mutants(text)
    found = [m.after for m in counted if m.before == line]
    assert any(after.replace(" ", "") == change.replace(" ", "") for after in found), found
    parse(next(m for m in counted if m.before == line).apply(text))
