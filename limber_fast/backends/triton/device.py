"""What every op of this backend asks of a GPU: which chips and dtypes, how many programs, the precision of fp32."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from limber_fast import __version__

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST, NEWEST = (8, 0), (10, 9)
# Two programs a multiprocessor: while one waits at its epilogue the other keeps the tensor cores busy.
PROGRAMS_PER_SM = 2


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton cannot run an op on these tensors; None where it can."""
    if dtype not in DTYPES:
        return f"computes in float32, bfloat16 and float16; got {str(dtype).removeprefix('torch.')}"
    if not torch.cuda.is_available():
        return "no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return f"needs compute capability 8.0 or newer; this device has {capability[0]}.{capability[1]}"
    if capability > NEWEST:
        found = f"{capability[0]}.{capability[1]}"
        return f"has no tiles for compute capability {found} yet: those of 10.x need tensor memory"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton does not import ({error}); install torch's own version of it"
    return None


def guarded(adapter: Callable[..., Any]) -> Callable[..., Any]:
    """The adapter, with the device of its first tensor as the current one: Triton launches there, on its stream."""

    @wraps(adapter)
    def run(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device_of(first):
            return adapter(first, *args, **kwargs)

    return run


def chip(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability, and how many programs a persistent kernel starts."""
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), PROGRAMS_PER_SM * properties.multi_processor_count


def may_time(device: torch.device) -> bool:
    """Whether launches can be timed now: not while a CUDA graph records them."""
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def versions(device: torch.device) -> str:
    """What a timing is good for: the GPU, and who compiled the kernels."""
    import triton

    return f"{torch.cuda.get_device_name(device)}, triton {triton.__version__}, limber_fast {__version__}"


def precision() -> str:
    """Of fp32 products: 'tf32' where torch allows it."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def prepare(tma: bool) -> None:
    """Before a launch whose programs make TMA descriptors: Triton asks where to put them."""
    if tma:
        import triton

        triton.set_allocator(_scratch)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device="cuda")
