"""The CUDA extension's prefix_attention as compiled: its PTX executed, and what each chip needs for it.

PTX is that of sm_80, which ptxas turns into code for every chip; `slow_gpu` compiles for each as setup.py does.
"""

from __future__ import annotations

import functools
import re

import pytest
import torch
from ops.test_prefix_attention_values import Call

from gpu.nvcc import Kernel, Launch, assembled, emulated, executed, launches, needs_nvcc, ptx_file, source
from gpu.ptx.stats import Recorder
from gpu.test_prefix_attention_emulated import LONG
from gpu.test_prefix_attention_int8_emulated import LONG as INT8_LONG
from gpu.test_prefix_attention_int8_emulated import Int8Call
from limber_fast import prefix_attention
from limber_fast.backends import cuda
from limber_fast.report.aot.chips import CHIPS, occupancy

pytestmark = [needs_nvcc, pytest.mark.usefixtures("poisoned")]
STEM = "prefix_attention"
SHIPPED = ("sm_80", "sm_90", "sm_100")  # 8.6 and 8.9 run the code of sm_80
ONE_BLOCK = ("sm_89",)  # two do not fit into its shared memory at D = 256


@functools.cache
def launch_by_kernel() -> dict[str, Launch]:
    """Every build that the launcher asks for, by its mangled name."""
    found: dict[str, Launch] = {}
    with launches(lambda launch: found.setdefault(launch.kernel, launch)):
        for dtype in (torch.bfloat16, torch.float16):
            for dims in (64, 128, 256):
                for step in (((0, 1), (0, 1)), ((0, 40),)):  # 16 rows a block, and 32
                    for pool in (Call(dtype, 1, dims).pool, Int8Call(dtype, dims).pool):
                        batch = pool.batch([pool.sequence() for _ in step], [cached + new for cached, new in step])
                        rows = torch.zeros(3, batch.tokens, pool.storage.shape[2], dims, dtype=dtype)
                        scales = pool.layer_scales(0)
                        prefix_attention(*rows, pool.layer(0), batch, page_scales=scales, backend="cuda")
    return found


def is_int8(kernel: str) -> bool:
    return re.search(r"(bfloat16|half)aLi", kernel) is not None


def check_gate(kernels: dict[str, Kernel], target: str) -> None:
    """No spills, products on tensor cores, copies past the registers, two blocks on an SM of up to 32 rows."""
    launched, chip = launch_by_kernel(), CHIPS[target]
    assert launched.keys() == kernels.keys() and len(kernels) == 36
    for name, kernel in kernels.items():
        launch = launched[name]
        blocks = occupancy(chip, kernel.registers, launch.shared, launch.threads).blocks
        rows = re.search(r"Li(\d+)ELi(\d+)", name)
        kind = ("fp16" if "half" in name else "bf16") + " over int8" * is_int8(name)
        print(f"{target} {'parts' if 'parts' in name else 'rest'} D {rows[1]} rows {rows[2]} {kind}: "
              f"{kernel.registers} registers, {launch.shared} bytes, {blocks} blocks")  # fmt: skip
        assert kernel.stack == 0 and not kernel.opcodes.keys() & {"LDL", "STL"}, name
        assert kernel.opcodes["HMMA"] >= 8 and kernel.opcodes["LDSM"] >= 4, name
        assert kernel.opcodes["LDGSTS"] >= (2 if is_int8(name) else 4), name
        assert blocks >= (1 if target in ONE_BLOCK else 2), (name, blocks)


@pytest.mark.parametrize(
    "target", [pytest.param(x, marks=pytest.mark.slow_gpu if x.startswith("sm_8") else ()) for x in CHIPS]
)
def test_gate(target):
    check_gate(assembled(ptx_file(STEM, "sm_80"), target), target)


@pytest.mark.slow_gpu
@pytest.mark.parametrize("target", SHIPPED)
def test_gate_of_what_ships(target):
    check_gate(assembled(source(STEM), target), target)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_ptx(dtype):
    """Bounds, alignment, copies awaited, no access to shared memory that no barrier orders, none between blocks."""
    with executed("sm_80", races=True) as done:
        call = Call(dtype, 1, 64)
        call.check("cuda", *call.alone(((33, 17), (16, 0), (520, 1))))  # a block takes two splits, one after the other
        call = Call(dtype, 1, 64)
        call.check("cuda", *call.forked((20, 50), ((0, 1), (5, 1), (1, 6), (9, 1))))
    kernels = [launch.kernel for launch in done if launch.stem == STEM]
    assert len(kernels) == 4 and len({*kernels}) == 3


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_ptx_over_int8(dtype):
    """The same of int8 pages, whose scales are read past shared memory."""
    with executed("sm_80", races=True) as done:
        Int8Call(dtype).check("cuda", step=((33, 17), (16, 0), (520, 1)))
        Int8Call(dtype).check("cuda", prefix=48, members=((0, 1), (1, 6), (9, 1)))
    assert len({launch.kernel for launch in done if launch.stem == STEM and is_int8(launch.kernel)}) == 3


@pytest.mark.slow_gpu
@pytest.mark.parametrize("target", SHIPPED)
@pytest.mark.parametrize("dims", [64, 128, 256])
def test_ptx_over_int8_of_every_chip(target, dims):
    for dtype in (torch.bfloat16, torch.float16):
        with executed(target, races=True):
            Int8Call(dtype, dims).check("cuda", **INT8_LONG["private over two"])


def test_ptx_of_the_model_s_head():
    """D = 256 and a tile whose 32 rows are all taken, over a split."""
    with executed("sm_80", races=True):
        call = Call(torch.bfloat16, 1, 256, rotary_dims=64)
        call.check("cuda", *call.forked((270,), tuple((i % 3, 1) for i in range(33))))


@pytest.mark.slow_gpu
@pytest.mark.parametrize("target", SHIPPED)
@pytest.mark.parametrize("dims", [64, 128, 256])
@pytest.mark.parametrize("fork", LONG)
def test_ptx_of_every_chip(target, dims, fork):
    for dtype in (torch.bfloat16, torch.float16):
        with executed(target, races=True):
            call = Call(dtype, 1, dims)
            call.check("cuda", *call.forked(*LONG[fork]))


@pytest.mark.parametrize("int8", [False, True])
def test_each_key_and_value_is_read_once_for_a_group(int8):
    """Bytes that cp.async asks for, from the addresses of the executed code: tiles of 32 keys of the prefix once for
    20 members, and of what each holds alone; hardly a bank conflict."""
    recorder = Recorder()
    call = Int8Call(torch.bfloat16, 256) if int8 else Call(torch.bfloat16, 1, 256)
    held = call.sequences("cuda", (), 128, ((15, 1),) * 20) if int8 else call.forked((128,), ((15, 1),) * 20)
    batch = call.pool.batch(*held)
    with executed("sm_80", recorder=recorder):
        rows, scales = call.rows(batch.tokens), call.pool.layer_scales(0)
        prefix_attention(*rows, call.pool.layer(0), batch, page_scales=scales, backend="cuda")
    found = sum(traffic.bytes for (space, text), traffic in recorder.traffic.items()
                if space == "global" and "cp.async" in text)  # fmt: skip
    row = rows[0].shape[1] * 2 * 256 * (1 if int8 else 2)
    assert (128 + 20 * 16) * row <= found <= (128 + 20 * 32) * row
    assert recorder.total("shared").efficiency > 0.9, recorder.worst("shared")


def test_modelled_bytes():
    """One layer of GPT-J at 32 questions, 800 shared tokens and 16 private ones: at most 1.10 of the floor.

    The floor is every K and V once, q, the new k and v in and out, and the result; above it are the parts, written and
    read. Their number is what the kernels left, in a workspace full of NaN.
    """
    heads: list[torch.Tensor] = []
    empty = torch.empty

    def noted(*args, **kwargs):
        x = empty(*args, **kwargs)
        if len(args) == 4 and args[3] == 4:
            heads.append(x)
        return x

    call = Call(torch.bfloat16, 1, 256, rotary_dims=64)
    sequences, queries = call.forked((800,), ((15, 1),) * 32)
    batch = call.pool.batch(sequences, queries)
    assert batch.private.tolist() == [800] * 32
    with emulated(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda.torch, "empty", noted)
        prefix_attention(*call.rows(batch.tokens), call.pool.layer(0), batch, backend="cuda")
    parts = int((~heads[0][..., 0].isnan()).sum())
    assert parts == 32 * 4
    token, row = 2 * 256 * 2, 256 * 2
    floor = (800 + 32 * 16) * token + 2 * 32 * row + 2 * 32 * token
    written_and_read = 2 * parts * (256 * 2 + 16)
    ratio = (floor + written_and_read) / floor
    print(f"modelled bytes over the floor: {ratio:.3f}; unshared over shared {816 * 32 * token / floor / ratio:.1f}")
    assert ratio <= 1.10
