"""What every adapter hands to the kernels: dtype names, addresses, and the number of threads."""

from __future__ import annotations

import os

import torch
from torch import Tensor

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
# libgomp's threads do not survive fork and a child that waits for them never returns: a forked child computes on one.
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_after_fork)


def threads() -> int:
    return 1 if _forked else torch.get_num_threads()


def address(x: Tensor | None) -> int:
    return 0 if x is None or not x.numel() else x.data_ptr()


def unknown_dtype(dtype: torch.dtype) -> str | None:
    """Why the kernels do not compute in `dtype`, or None."""
    if dtype in DTYPES:
        return None
    return f"computes in float32, bfloat16 and float16; got {str(dtype).removeprefix('torch.')}"
