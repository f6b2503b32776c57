"""What every op needs around its kernels to be a good citizen of torch.library, autograd and torch.func.

An op is a forward and a backward in one library, each with a kernel for all backends and a fake one; autograd is a
kernel of its own for the Autograd key, which refuses what the op cannot do, in the op's words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("limber_fast", "FRAGMENT")

_KERNELS: dict[Any, Callable[..., Any]] = {}
_FUNCTIONS: dict[Any, type[torch.autograd.Function]] = {}
_PLAIN = {Tensor, torch.nn.Parameter, type(None), bool, int, float, str, list}


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any], no_vmap: str) -> None:
    """Registers `limber_fast::<name of the schema>`; torch.vmap over it raises `no_vmap`."""
    LIBRARY.define(schema)
    name = schema.partition("(")[0]

    def refuse(info: Any, in_dims: Any, *args: Any) -> None:
        raise RuntimeError(no_vmap)

    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"limber_fast::{name}", fake, lib=LIBRARY)
    torch.library.register_vmap(f"limber_fast::{name}", refuse, lib=LIBRARY)
    _KERNELS[getattr(torch.ops.limber_fast, name).default] = kernel


def _watched(inputs: tuple[Any, ...]) -> bool:
    """Whether somebody has to see the op itself: a compiler, a mode, a transform, a profiler or a tensor subclass."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
        or (
            not _PLAIN.issuperset(map(type, inputs))
            and any(isinstance(x, Tensor) and type(x) not in _PLAIN for x in inputs)
        )
    )


def call(op: Any, *inputs: Any) -> Any:
    """`op(*inputs)`, past the dispatcher where nobody watches: it hands a Python kernel its arguments twice, boxed, for
    25 us forward and 20 us backward, a tenth of an InfoNCE step at N = 256."""
    if _watched(inputs):
        return op(*inputs)
    if op in _FUNCTIONS and torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
        return _FUNCTIONS[op].apply(*inputs)
    return _KERNELS[op](*inputs)


def below_autograd(op: Any, *inputs: Any) -> Any:
    if not (torch.is_grad_enabled() or _watched(inputs)):
        return _KERNELS[op](*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*inputs)


def run_backward(op: Any, *inputs: Any) -> tuple[Tensor, ...]:
    """The backward op from inside a backward pass."""
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:  # create_graph=True, or forward over reverse
        return op(*inputs)
    return below_autograd(op, *inputs)  # nothing records: one dispatch less, 15 us


def not_differentiable(op: Any, stem: str, remedy: str) -> type[torch.autograd.Function]:
    """The autograd function of a backward op: it runs, and its own derivative is an error that ends in `remedy`."""

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
            return below_autograd(op, *inputs)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> None:
            raise RuntimeError(f"{stem}: its gradient cannot be differentiated again; {remedy}")

    return Backward


def _has_tangent(*inputs: Any) -> bool:
    if forward_ad._current_level < 0:  # no dual level is open: all that a call without forward mode pays
        return False
    return any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in inputs)


def differentiate(op: Any, function: type[torch.autograd.Function], stem: str, remedy: str) -> None:
    """Makes `function` the derivative of `op`; forward mode and torch.func are errors that end in `remedy`."""

    # torch.library.register_autograd would do the same for 70 us more per call (it re-reads the schema each time).
    def kernel(*inputs: Any) -> Any:
        if _has_tangent(*inputs):  # below autograd the op would drop it: a derivative of zero
            raise RuntimeError(f"{stem}: forward-mode differentiation is not supported; {remedy}")
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            if torch._C._are_functorch_transforms_active():
                raise RuntimeError(
                    f"{stem}: torch.func transforms are not supported; use torch.autograd.grad; {remedy}"
                )
            return function.apply(*inputs)
        return below_autograd(op, *inputs)

    LIBRARY.impl(op, kernel, "Autograd")
    _FUNCTIONS[op] = function


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The operands of a product as torch.autocast, where it is on, casts them: float64 stays."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors)
