"""The CUDA C++ backend (CUDA tensors): tensors to the parameters of csrc/cuda. Ops without a kernel here say so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from limber_fast import dispatch, native

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
    if request.D not in _HEAD_DIMENSIONS:
        return f"takes heads of 64, 128 or 256 dimensions; got {request.D}"
    if request.page_size & (request.page_size - 1):
        return f"takes pages of 1, 2, 4, 8, ... tokens; got {request.page_size}"
    return _device_refuses(request.device)


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
        pages=_address(pages), page_stride=pages.stride(0), page_scales=_address(page_scales),
        page_scales_stride=0 if page_scales is None else page_scales.stride(0), T=T, N=len(lengths), H=H, D=D,
        page_size=pages.shape[3], dtype=_DTYPES[q.dtype], queries=_address(queries), lengths=_address(lengths),
        page_table=_address(page_table), table_width=page_table.shape[1], order=_address(order),
        shared=_address(shared), runs=len(shared), alone=_address(private), depth=depth, positions=_address(positions),
        rotary=_address(rotary), rotary_dims=0 if rotary is None else rotary.shape[1], scale=scale, out=_address(out),
        part_sums=_address(part_sums), part_heads=_address(part_heads), slots=slots, device=q.device.index,
        stream=_stream(q.device),
    )  # fmt: skip
    return out


def page_copy_supports(storage: Tensor, scales: Tensor | None) -> str | None:
    """None where `page_copy` can copy pages of this pool, else the reason why not."""
    if "cuda" not in dispatch.ORDER.get(storage.device.type, ()):
        return f"runs on cuda tensors; got {storage.device.type}"
    if any(x.data_ptr() % 16 or _page_bytes(x) % 16 for x in (storage, scales) if x is not None):
        return "copies 16 bytes at a time; pages or their scales do not end there"
    try:
        return _device_refuses(storage.device)
    except dispatch.BackendUnavailable as missing:
        return str(missing)


def page_copy(storage: Tensor, scales: Tensor | None, pairs: list[tuple[int, int]]) -> None:
    """storage[:, to] = storage[:, from] for every (from, to), and the scales likewise: one launch, no synchronisation.

    Args:
        storage: [layers, n_pages, ...], contiguous, 16-byte aligned as a page in one layer is. scales: the same, or
            None.
        pairs: page numbers; no page is written twice, or both read and written.

    Raises: ValueError where pairs or alignment break this.
    """
    native.cuda().page_copy(
        pages=_address(storage), scales=_address(scales), layers=storage.shape[0], n_pages=storage.shape[1],
        page_bytes=_page_bytes(storage), scale_bytes=0 if scales is None else _page_bytes(scales), pairs=pairs,
        device=storage.device.index, stream=_stream(storage.device),
    )  # fmt: skip


def _page_bytes(x: Tensor) -> int:
    return x.stride(1) * x.itemsize


def _device_refuses(device: torch.device) -> str | None:
    native.cuda()
    if not torch.cuda.is_available():
        return "no CUDA device"
    found = torch.cuda.get_device_capability(device)
    return None if found >= _OLDEST else f"needs compute capability 8.0 or newer; this device has {found[0]}.{found[1]}"


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _address(x: Tensor | None) -> int:
    return 0 if x is None or not x.numel() else x.data_ptr()


def _aligned(x: Tensor) -> Tensor:
    """Rows of q, k and v as the kernels read them: 16 bytes at a time."""
    return x if x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0 else x.clone(memory_format=torch.contiguous_format)
