"""Traps of the interpreted kernels: each must spring on a bad kernel and on no good one."""

from __future__ import annotations

import pytest
import torch

from gpu import samples
from gpu.interpret import Violation, checked, interpreted
from gpu.launching import executed


def run(kernel, grid, *arguments, **constants) -> None:
    tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
    with interpreted(), checked(*tensors):
        kernel[grid](*arguments, **constants)


def test_masked_tail_passes():
    x, out = torch.randn(100), torch.zeros(100)
    run(samples.copy_kernel, (2,), x, out, 100, BLOCK=64, LOAD_MASK=True, STORE_MASK=True)
    assert torch.equal(out, x)


@pytest.mark.parametrize(("kind", "tensor"), [("load", 0), ("store", 1)])
def test_unmasked_tail_is_out_of_bounds(kind, tensor):
    memory = torch.zeros(2, 1000)  # both tensors inside it, so that the bad access harms nobody
    x, out = memory[0, :100], memory[1, :100]
    message = rf"{kind} of 28 elements by program \(1, 0, 0\), the first at element 100 of tensor {tensor}.*\(100,\)"
    with pytest.raises(Violation, match=message):
        run(samples.copy_kernel, (2,), x, out, 100, BLOCK=64, LOAD_MASK=kind != "load", STORE_MASK=kind != "store")


def test_padding_between_rows_is_out_of_bounds():
    x, out = torch.randn(4, 24)[:, :16], torch.zeros(4, 24)[:, :16]
    run(samples.columns_kernel, (4,), x, out, 24, 16, BLOCK=32)
    assert torch.equal(out, x)
    with pytest.raises(Violation, match=r"element 16 of tensor 0"):
        run(samples.columns_kernel, (4,), x, out, 24, 17, BLOCK=32)


def test_named_tensor_is_named():
    x, out = torch.zeros(64), torch.zeros(128)
    with pytest.raises(Violation, match="of x, which"), interpreted(), checked(x=x[:32], out=out):
        samples.copy_kernel[(1,)](x, out, 64, BLOCK=64, LOAD_MASK=True, STORE_MASK=True)


def test_sum_without_atomics_is_a_race():
    x, out = torch.randn(100), torch.zeros(1)
    run(samples.sum_kernel, (2,), x, out, 100, BLOCK=64, ATOMIC=True)
    torch.testing.assert_close(out[0], x.sum())
    with pytest.raises(Violation, match=r"race in tensor 1: load by program \(1, 0, 0\) after another's store"):
        run(samples.sum_kernel, (2,), x, out, 100, BLOCK=64, ATOMIC=False)


def test_one_program_may_read_what_it_wrote():
    run(samples.sum_kernel, (1,), torch.randn(64), torch.zeros(1), 64, BLOCK=64, ATOMIC=False)


def test_reading_what_a_later_program_writes_is_a_race():
    with pytest.raises(Violation, match=r"store by program \(1, 0, 0\) after another's load"):
        run(samples.neighbour_kernel, (4,), torch.zeros(5))


def test_launches_are_ordered():
    x, out = torch.randn(128), torch.zeros(128)
    with interpreted(), checked(x, out):
        samples.copy_kernel[(2,)](x, out, 128, BLOCK=64, LOAD_MASK=True, STORE_MASK=True)
        samples.copy_kernel[(1,)](out, x, 128, BLOCK=128, LOAD_MASK=True, STORE_MASK=True)


def test_descriptors_are_watched():
    x, out = torch.randn(32, 16), torch.zeros(32, 16)
    run(samples.overlapping_store_kernel, (2,), x, out, 32, 16, STEP=16, BLOCK=16)
    assert torch.equal(out, x)
    with pytest.raises(Violation, match=r"race in tensor 1: store by program \(1, 0, 0\) after another's store"):
        run(samples.overlapping_store_kernel, (2,), x, out, 32, 16, STEP=8, BLOCK=16)
    with pytest.raises(Violation, match="out of bounds: store"):  # the descriptor claims more rows than there are
        run(samples.overlapping_store_kernel, (2,), x, out[:20], 32, 16, STEP=16, BLOCK=16)


def test_sums_by_descriptor_may_overlap():
    """As on a GPU: one addition after the other, none past the ends."""
    x, start = torch.randn(20, 16), torch.randn(20, 16)
    interpreted_sum, executed_sum = start.clone(), start.clone()
    run(samples.overlapping_store_kernel, (2,), x, interpreted_sum, 20, 16, STEP=8, BLOCK=16, ADD=True)
    with executed("sm_90"):
        samples.overlapping_store_kernel[(2,)](x, executed_sum, 20, 16, STEP=8, BLOCK=16, ADD=True)
    expected = start + x
    expected[8:16] += x[8:16]
    assert torch.equal(interpreted_sum, expected) and torch.equal(executed_sum, expected)


def test_gradient_of_nothing_may_be_touched():
    with pytest.raises(Violation, match="out of bounds: load"):
        run(samples.copy_kernel, (1,), torch.zeros(0), torch.zeros(64), 64, BLOCK=64, LOAD_MASK=True, STORE_MASK=True)
