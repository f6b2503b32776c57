"""prefix_attention by the CUDA extension, captured once and replayed while lengths, page table, K and V change.

Without a device the launches as captured, grids and parameters included, are executed from their PTX again and again.
"""

from __future__ import annotations

from collections.abc import Callable

import cases
import pytest
import torch
from ops.test_prefix_attention_values import Call
from torch import Tensor

from gpu.launching import ON_DEVICE
from gpu.nvcc import Launch, emulated, execute_launch, launches, needs_nvcc
from limber_fast import prefix_attention
from limber_fast.reference.prefix_attention import prefix_attention as reference

pytestmark = pytest.mark.usefixtures("poisoned")
WIDTH = 36  # of the page table: more than any step needs


def captured(engine: str, step: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
    """The result's place, and what fills it again."""
    if engine == "cuda":
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # kernels are loaded when they first run, which no capture may hold
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
        return out, graph.replay
    found: list[Launch] = []
    with launches(found.append):
        out = step()
    return out, lambda: [execute_launch(launch, engine, races=True) for launch in found]


@pytest.mark.parametrize("engine", [pytest.param("sm_80", marks=needs_nvcc), pytest.param("cuda", marks=ON_DEVICE)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_replays_of_a_captured_decode(engine, dtype):
    """Forks of one prefix, one token each; the longest grows past 256 tokens, where it leaves its first part."""
    device = "cuda" if engine == "cuda" else "cpu"
    call = Call(dtype, 2, 64)
    sequences, new = call.forked((40,), ((3, 1), (0, 1), (214, 1), (9, 1)))
    batch, pages = call.pool.batch(sequences, new), call.pool.layer(0)
    tensors = ("queries", "lengths", "page_table", "order", "shared", "private")
    current = {name: getattr(batch, name) for name in tensors}
    batch.page_table = torch.zeros(len(new), WIDTH, dtype=torch.int32)
    for name in tensors:
        setattr(batch, name, getattr(batch, name).to(device))
    rows = torch.zeros(3, len(new), 2, 64, dtype=dtype, device=device)
    rotary, held = call.rotary.to(device), pages.clone().to(device)
    out, replay = captured(engine, lambda: prefix_attention(*rows, held, batch, rotary=rotary, backend="cuda"))

    for seed in range(4):
        q, k, v = call.rows(len(new), seed)
        pages *= -0.5
        before, tables = pages.clone(), [s.pages for s in sequences]
        true, true_pages = reference(q.double(), k.double(), v.double(), before.double(), new,
                                     [s.length for s in sequences], tables, rotary=call.rotary)  # fmt: skip
        for name, x in current.items():
            to = getattr(batch, name)
            (to[:, : x.shape[1]] if name == "page_table" else to).copy_(x)
        for to, x in zip(rows, (q, k, v), strict=True):
            to.copy_(x)
        held.copy_(pages)
        out.fill_(torch.nan)
        replay()
        eager_pages = before.to(device)
        eager = prefix_attention(*rows, eager_pages, batch, rotary=rotary, backend="eager").cpu()
        for error, allowed in zip(cases.errors(out.cpu(), true), cases.errors(eager, true), strict=True):
            assert error <= 2 * allowed + cases.FLOOR[dtype], (seed, error, allowed)
        pages.copy_(held)
        assert torch.equal(pages.isnan(), true_pages.isnan())
        assert max(cases.errors(pages.nan_to_num(), true_pages.nan_to_num())) <= 2 * cases.FLOOR[dtype]
        following = call.pool.batch(sequences, new)
        current = {name: getattr(following, name) for name in tensors}
    assert max(s.length for s in sequences) > 256 + 1


READS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")


@needs_nvcc
@pytest.mark.parametrize("name", READS)
def test_nothing_on_the_way_to_the_launch_reads_a_tensor(monkeypatch, name):
    """What would wait for the device, or break a capture."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"Tensor.{name} waits for the device")

    call = Call(torch.bfloat16, 2, 64)
    sequences, queries = call.forked((40,), ((3, 1), (0, 1), (5, 20)))
    batch = call.pool.batch(sequences, queries)
    rows = call.rows(batch.tokens)
    with emulated():
        monkeypatch.setattr(torch.Tensor, name, refuse)
        prefix_attention(*rows, call.pool.layer(0), batch, rotary=call.rotary, backend="cuda")
