"""What every op of this backend asks of a GPU: which chips and dtypes, how many programs, the precision of fp32."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST, NEWEST = (8, 0), (9, 9)
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
        return f"has no tiles for compute capability {capability[0]}.{capability[1]} yet: those of 9.0 spill there"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton does not import ({error}); install torch's own version of it"
    return None


def chip(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability, and how many programs a persistent kernel starts."""
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), PROGRAMS_PER_SM * properties.multi_processor_count


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
