"""The CUDA C++ backend (CUDA tensors): tensors to the parameters of csrc/cuda. Ops without a kernel here say so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from limber_fast import native

_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
_HEAD_DIMENSIONS = (64, 128, 256)
_OLDEST = (8, 0)


def info_nce_supports(request: Any) -> str:
    return "no info_nce kernel in this release"


def project_concat_supports(request: Any) -> str:
    return "no project_concat kernel in this release"


def int8_linear_supports(request: Any) -> str:
    return "no int8_linear kernel in this release"


def frozen_cross_entropy_supports(request: Any) -> str:
    return "no frozen_cross_entropy kernel in this release"


def prefix_attention_supports(request: Any) -> str | None:
    if request.dtype not in _DTYPES:
        return f"computes in bfloat16 and float16; got {str(request.dtype).removeprefix('torch.')}"
    if request.page_dtype == torch.int8:
        return "keeps keys and values in the dtype of q; got torch.int8"
    if request.D not in _HEAD_DIMENSIONS:
        return f"takes heads of 64, 128 or 256 dimensions; got {request.D}"
    if request.page_size & (request.page_size - 1):
        return f"takes pages of 1, 2, 4, 8, ... tokens; got {request.page_size}"
    native.cuda()
    if not torch.cuda.is_available():
        return "no CUDA device"
    found = torch.cuda.get_device_capability(request.device)
    return None if found >= _OLDEST else f"needs compute capability 8.0 or newer; this device has {found[0]}.{found[1]}"


def prefix_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor, page_scales: Tensor | None, queries: Tensor, lengths: Tensor,
    page_table: Tensor, order: Tensor, shared: Tensor, private: Tensor, depth: int, positions: Tensor | None,
    rotary: Tensor | None, *, scale: float,
) -> Tensor:  # fmt: skip
    module = native.cuda()
    q, k, v = map(_aligned, (q, k, v))
    T, H, D = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    slots = module.prefix_attention_slots(page_table.shape[1], pages.shape[3], depth)
    # The caching allocator keeps both for the stream's next call, and a graph's own pool for its replays.
    part_sums = torch.empty(T, H, slots, D, dtype=torch.float16, device=q.device)
    part_heads = torch.empty(T, H, slots, 4, dtype=torch.float32, device=q.device)
    module.prefix_attention_fwd(
        q=_address(q), k=_address(k), v=_address(v), q_stride=q.stride(0), k_stride=k.stride(0), v_stride=v.stride(0),
        pages=_address(pages), page_stride=pages.stride(0), T=T, N=len(lengths), H=H, D=D, page_size=pages.shape[3],
        dtype=_DTYPES[q.dtype], queries=_address(queries), lengths=_address(lengths), page_table=_address(page_table),
        table_width=page_table.shape[1], order=_address(order), shared=_address(shared), runs=len(shared),
        alone=_address(private), depth=depth, positions=_address(positions), rotary=_address(rotary),
        rotary_dims=0 if rotary is None else rotary.shape[1], scale=scale, out=_address(out),
        part_sums=_address(part_sums), part_heads=_address(part_heads), slots=slots, device=q.device.index,
        stream=_stream(q.device),
    )  # fmt: skip
    return out


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _address(x: Tensor | None) -> int:
    return 0 if x is None or not x.numel() else x.data_ptr()


def _aligned(x: Tensor) -> Tensor:
    """Rows of q, k and v as the kernels read them: 16 bytes at a time."""
    return x if x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0 else x.clone(memory_format=torch.contiguous_format)
