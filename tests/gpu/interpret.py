"""Runs a @triton.jit kernel on CPU tensors in the process that also compiles it.

    with interpreted(), checked(x, out):
        kernel[grid](x, out, BLOCK=128)

Triton decides when a kernel is *defined* whether it will be interpreted (TRITON_INTERPRET=1); `interpreted()` decides
at the launch. Its bf16 and fp8 are right (numerics.py), and memory.py traps accesses that a GPU would not forgive.
Not interpreted: inline assembly, libdevice, atomics on bf16.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as stock
from triton.runtime.jit import JITFunction

from gpu import numerics
from gpu.memory import Violation, checked

__all__ = ["Violation", "checked", "interpreted"]

_rewritten: dict[Callable[..., Any], stock.InterpretedFunction] = {}


@contextlib.contextmanager
def interpreted(traps: bool = False) -> Iterator[None]:
    """Launches of @triton.jit kernels inside the block run in Triton's interpreter, programs one after the other.

    traps: a launch may touch the tensors it is given and nothing else, and its programs must not race; as `checked`.

    Define and import kernels outside: what is decorated inside the block stays interpreted for good.
    """
    before = triton.knobs.runtime.interpret
    with contextlib.ExitStack() as stack:
        stack.enter_context(_interpreted_language())
        stack.enter_context(numerics.repaired())
        stack.enter_context(_one_blas_thread())
        stack.enter_context(np.errstate(all="ignore"))  # infinities and NaN are values here, as on the GPU
        stack.enter_context(mock.patch.object(JITFunction, "run", _trapped if traps else _launch))
        stack.enter_context(mock.patch.object(JITFunction, "__call__", _call))
        triton.knobs.runtime.interpret = True
        try:
            yield
        finally:
            triton.knobs.runtime.interpret = before


def _launch(self: JITFunction, *arguments: Any, grid: Any, warmup: bool = False, **keywords: Any) -> None:
    try:
        _interpreted_function(self).run(*arguments, grid=grid, warmup=warmup, **keywords)
    except Exception as error:
        raise _cause(error) from None


def _trapped(self: JITFunction, *arguments: Any, **keywords: Any) -> None:
    with checked(*(x for x in (*arguments, *keywords.values()) if isinstance(x, torch.Tensor))):
        _launch(self, *arguments, **keywords)


def _call(self: JITFunction, *arguments: Any, **keywords: Any) -> Any:
    """A device function called by a kernel.

    Not InterpretedFunction.__call__: that patches `tl` and `tl.core` once more for each call and never takes it back.
    """
    return _interpreted_function(self).rewrite()(*arguments, **keywords)


def _interpreted_function(kernel: JITFunction) -> stock.InterpretedFunction:
    """The kernel's interpreted twin, without the names that rewriting leaves in the kernel's module."""
    if kernel.fn not in _rewritten:
        names = kernel.fn.__globals__
        before = set(names)
        function = stock.InterpretedFunction(kernel.fn)
        function.rewrite()
        for name in set(names) - before - {"interpreter_semantic"}:
            del names[name]
        _rewritten[kernel.fn] = function
    return _rewritten[kernel.fn]


def _cause(error: BaseException) -> BaseException:
    """The violation or the kernel's own error under the interpreter's wrappers, one per level of calls."""
    while isinstance(error, stock.InterpreterError) and error.__cause__ is not None:
        error = error.__cause__
    return error


@contextlib.contextmanager
def _interpreted_language() -> Iterator[None]:
    """Patches Triton's language once, and afterwards restores every attribute.

    The stock interpreter patches it at each launch and each call of a device function; what calls patched is not taken
    back, `tl.core` stays patched, and the next compilation fails inside `tl.max`.
    """
    owners = (tl, tl.core, tl.math, tl.core.tensor, tl.core.dtype, tl.core.tensor_descriptor_base)
    before = [dict(vars(owner)) for owner in owners]
    stock._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    try:
        with mock.patch.object(stock, "_patch_lang", lambda kernel: SimpleNamespace(restore=lambda: None)):
            yield
    finally:
        for owner, attributes in zip(owners, before, strict=True):
            _restore(owner, attributes)


def _restore(owner: Any, attributes: dict[str, Any]) -> None:
    for name, value in dict(vars(owner)).items():
        if name not in attributes:
            if name != "__annotations__":  # Python makes it on demand
                delattr(owner, name)
        elif value is not attributes[name]:
            setattr(owner, name, attributes[name])


def _one_blas_thread() -> contextlib.AbstractContextManager[Any]:
    """NumPy's products of small tiles lose more in waking threads than they win."""
    try:
        from threadpoolctl import threadpool_limits
    except ModuleNotFoundError:
        return contextlib.nullcontext()
    return threadpool_limits(1, user_api="blas")
