"""bf16, fp8 and tf32 in Triton's interpreter, which computes on their bit patterns as if those were integers.

It keeps a bf16 tensor as uint16 and converts on few paths: `a + b` adds the patterns, `tl.dot` multiplies them, casts
cut instead of rounding to nearest. Here an operation widens its narrow operands to fp32 and rounds its result once.
Products of fp32 that Triton would run in tf32 (its default) lose the bits they would lose on the GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter as stock
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

NARROW = {tl.bfloat16: torch.bfloat16, tl.float8e5: torch.float8_e5m2, tl.float8e4nv: torch.float8_e4m3fn}
_BITS = {1: torch.uint8, 2: torch.uint16}
_ARITHMETIC = ("binary_op", "unary_op", "ternary_op", "create_erf", "create_rsqrt")


@contextlib.contextmanager
def repaired() -> Iterator[None]:
    """Installs the repair for the length of the block."""
    replacements: list[tuple[type, str, Callable[..., Any]]] = [
        *((InterpreterBuilder, name, _rounded(getattr(InterpreterBuilder, name))) for name in _ARITHMETIC),
        (InterpreterBuilder, "create_fma", _rounded(_fused)),
        (InterpreterBuilder, "create_dot", _dot(InterpreterBuilder.create_dot)),
        (InterpreterBuilder, "cast_impl", _cast(InterpreterBuilder.cast_impl)),
        (InterpreterBuilder, "create_fp_to_fp", _fp_to_fp(InterpreterBuilder.create_fp_to_fp)),
        (InterpreterBuilder, "create_atomic_rmw", _atomic(InterpreterBuilder.create_atomic_rmw)),
        (stock.ReduceOps, "apply_impl", _reduced(stock.ReduceOps.apply_impl)),
        (stock.ScanOps, "apply_impl", _reduced(stock.ScanOps.apply_impl)),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in replacements:
            stack.enter_context(mock.patch.object(owner, name, replacement))
        reduction = mock.patch.object(InterpreterBuilder, "create_descriptor_reduce", _descriptor_reduce, create=True)
        stack.enter_context(reduction)
        # The stock class has no constants of these types: tl.full((N,), 1.5, tl.bfloat16) fails without.
        for dtype in NARROW:
            replacement = mock.patch.object(InterpreterBuilder, f"get_{dtype.name}", _constant(dtype), create=True)
            stack.enter_context(replacement)
        yield


def widen(handle: TensorHandle) -> TensorHandle:
    """A narrow handle's values in fp32; any other handle as it is."""
    dtype = _scalar(handle)
    if dtype not in NARROW:
        return handle
    return TensorHandle(_values(handle.data, dtype).float().numpy(), tl.float32)


def narrow(values: np.ndarray, dtype: tl.dtype) -> TensorHandle:
    """Rounds to nearest even; fp8 saturates, as the conversions of sm_89 and later do."""
    wide = torch.from_numpy(np.ascontiguousarray(values))
    if dtype.primitive_bitwidth == 8:
        largest = torch.finfo(NARROW[dtype]).max
        wide = wide.clamp(-largest, largest)
    rounded = wide.to(NARROW[dtype])
    return TensorHandle(rounded.view(_BITS[rounded.itemsize]).numpy(), dtype)


def _scalar(handle: TensorHandle) -> tl.dtype:
    return getattr(handle.dtype, "scalar", handle.dtype)


def _values(data: np.ndarray, dtype: tl.dtype) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(data)).view(NARROW[dtype])


def _rounded(method: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """Arithmetic in fp32, rounded to the operands' type; comparisons give booleans."""

    def run(self: InterpreterBuilder, *arguments: Any) -> TensorHandle:
        handles = [argument for argument in arguments if isinstance(argument, TensorHandle)]
        dtype = next((found for found in map(_scalar, reversed(handles)) if found in NARROW), None)
        result = method(self, *(widen(one) if isinstance(one, TensorHandle) else one for one in arguments))
        if result.data.dtype == np.bool_:  # the stock one says the operands' type, by which Triton 3.9 widens masks
            return TensorHandle(result.data, tl.int1)
        return result if dtype is None else narrow(result.data, dtype)

    return run


def _fused(self: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
    """x y + z with one rounding: in fp64 the product of two fp32 numbers is exact."""
    dtype = x.data.dtype
    wide = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
    return TensorHandle(wide.astype(dtype), x.dtype.scalar)


def _dot(method: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """Products in fp32; of tf32 operands the tensor cores read the upper 19 bits, which Triton does not round to."""

    def run(
        self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, sums: TensorHandle, precision: Any, *rest: Any
    ) -> TensorHandle:
        read = _cut_to_tf32 if precision == stock._ir.INPUT_PRECISION.TF32 else widen
        return method(self, read(a), read(b), sums, precision, *rest)

    return run


def _cut_to_tf32(handle: TensorHandle) -> TensorHandle:
    if _scalar(handle) != tl.float32:
        return widen(handle)
    bits = np.ascontiguousarray(handle.data).view(np.uint32) & np.uint32(0xFFFFE000)
    return TensorHandle(bits.view(np.float32), tl.float32)


def _cast(method: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def run(self: InterpreterBuilder, source: TensorHandle, target: tl.dtype) -> TensorHandle:
        source_type, target_type = _scalar(source), target.scalar
        if source_type == target_type:
            return TensorHandle(source.data, target_type)
        if target_type in NARROW:
            wide = widen(source).data
            return narrow(wide if wide.dtype.kind == "f" else wide.astype(np.float64), target_type)
        return method(self, widen(source), target)

    return run


def _fp_to_fp(method: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """The stock conversion is right only for rounding towards zero."""

    def run(self: InterpreterBuilder, source: TensorHandle, target: tl.dtype, rounding: Any) -> TensorHandle:
        if rounding is not None and rounding != stock._ir.ROUNDING_MODE.RTNE:
            return method(self, source, target, rounding)
        return self.cast_impl(source, target)

    return run


def _atomic(method: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def run(self: InterpreterBuilder, operation: Any, pointer: TensorHandle, value: TensorHandle, *rest: Any):
        if _scalar(value) in NARROW:
            raise NotImplementedError(f"the interpreter has no atomics on {_scalar(value)}: accumulate in fp32")
        return method(self, operation, pointer, value, *rest)

    return run


def _descriptor_reduce(
    self: InterpreterBuilder, kind: Any, descriptor: Any, value: TensorHandle, indices: list[TensorHandle]
) -> TensorHandle:
    """tensor_descriptor.atomic_add, which the stock class lacks."""
    if kind != ir.DESCRIPTOR_REDUCE_KIND.ADD or _scalar(value) != tl.float32:
        raise NotImplementedError(f"the interpreter only adds fp32 by descriptor, not {kind} of {_scalar(value)}")
    pointers, inside = descriptor.materialize_pointers(indices)
    how = ir.MEM_SEMANTIC.RELAXED, ir.MEM_SYNC_SCOPE.GPU
    return self.create_atomic_rmw(ir.ATOMIC_OP.FADD, pointers, value, inside, *how)


def _reduced(method: Callable[..., Any]) -> Callable[..., Any]:
    """Reductions and scans in fp32, rounded once at the end: a GPU rounds after every step."""

    def run(self: stock.ReduceScanOpInterface, inputs: tuple[tl.tensor, ...]) -> Any:
        if not any(one.dtype in NARROW for one in inputs):
            return method(self, inputs)
        wide = tuple(self.to_tensor(widen(one.handle).data, _wide_type(one.dtype)) for one in inputs)
        results = method(self, wide)
        if not isinstance(results, (list, tuple)):
            return _narrow_tensor(self, results, inputs[0].dtype)
        return [_narrow_tensor(self, *pair) for pair in zip(results, (one.dtype for one in inputs), strict=True)]

    return run


def _wide_type(dtype: tl.dtype) -> tl.dtype:
    return tl.float32 if dtype in NARROW else dtype


def _narrow_tensor(operation: stock.ReduceScanOpInterface, result: tl.tensor, dtype: tl.dtype) -> tl.tensor:
    if dtype not in NARROW or result.dtype != tl.float32:  # an index stays one
        return result
    data = narrow(result.handle.data, dtype).data
    return operation.to_tensor(data if result.type.is_block() else data[0], dtype)


def _constant(dtype: tl.dtype) -> Callable[[InterpreterBuilder, float], TensorHandle]:
    return lambda self, value: narrow(np.array([value], dtype=np.float32), dtype)
