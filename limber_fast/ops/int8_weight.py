"""Int8Weight: a frozen matrix as int8 values with one scale per output channel, packed for the kernels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limber_fast import checks, files, native

FORMAT, LAYOUT = "limber_fast.Int8Weight", 1
BLOCK, K_STEP = 32, 64  # output channels of a packed block; what K is padded to
_ROWS_AT_ONCE = 1 << 24  # elements of the weight that are quantised in one go: bounds the memory beside the result


def _packed_shape(n: int, k: int, by_rows: bool) -> tuple[int, ...]:
    width = -(-k // K_STEP) * K_STEP
    return (n, width) if by_rows else (-(-n // BLOCK), width // 4, BLOCK, 4)


def to_rows(packed: Tensor, n: int) -> Tensor:
    """[n, K up to a multiple of 64]: the rows that lie in blocks."""
    words = packed.view(torch.int32)[..., 0].transpose(1, 2)
    return words.reshape(-1, packed.shape[1])[:n].contiguous().view(torch.int8)


def to_blocks(rows: Tensor) -> Tensor:
    """The other way round."""
    words = torch.nn.functional.pad(rows.view(torch.int32), (0, 0, 0, -len(rows) % BLOCK))
    words = words.view(-1, BLOCK, words.shape[1]).transpose(1, 2).contiguous()
    return words[..., None].view(torch.int8)


class Int8Weight(torch.nn.Module):
    """A frozen [N, K] matrix: ``scales[n] * q[n, k]`` with integers q within -127..127.

    A module without parameters: it moves with `.to(device)`, its buffers travel in `state_dict()`, and `.half()` or
    `.to(dtype)` of a model leave its fp32 scales alone. `quantize_int8` makes one, `save` and `load` keep it in a file.

    Attributes:
        shape: (N, K).
        packed: q as the kernels of its device read it, 0 beyond N and K. On the CPU, and in files, [ceil(N / 32),
            ceil(K / 64) * 16, 32, 4] int8: element [b, g, c, j] is q[32 b + c, 4 g + j]. 4 neighbours along K are what
            a dot-product instruction takes, and 16 such groups of 16 channels are one AMX tile. On a GPU
            [N, ceil(K / 64) * 64] int8, row by row: what its copy engine and tensor cores take. `.to(device)` and
            `load_state_dict` change the one into the other.
        scales: [N] fp32.
        row_sums, column_sums: [N] and [K] int32, of q: what an asymmetric activation's zero point is multiplied by, in
            the forward and in the backward pass.
    """

    def __init__(self, n: int, k: int, device: str | torch.device | None = None) -> None:
        super().__init__()
        self.shape = (int(n), int(k))
        shape = _packed_shape(n, k, torch.device(device or torch.get_default_device()).type == "cuda")
        self.register_buffer("packed", _huge_pages(torch.empty(shape, dtype=torch.int8, device=device)))
        self.register_buffer("scales", torch.empty(n, dtype=torch.float32, device=device))
        self.register_buffer("row_sums", torch.empty(n, dtype=torch.int32, device=device))
        self.register_buffer("column_sums", torch.empty(k, dtype=torch.int32, device=device))

    def integers(self) -> Tensor:
        """[N, K] int8: q, exactly."""
        n, k = self.shape
        return (self.packed if self.packed.ndim == 2 else to_rows(self.packed, n))[:, :k]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K]: scales times q, for tests and for weights small enough to hold."""
        return (self.integers().to(dtype) * self.scales[:, None].to(dtype)).to(dtype)

    def extra_repr(self) -> str:
        return f"N={self.shape[0]}, K={self.shape[1]}"

    def _apply(self, fn: Any, recurse: bool = True) -> Int8Weight:
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != torch.float32:  # a model's .half()
            self.scales = scales.to(self.scales.device)
        self.arrange()
        return self

    def arrange(self) -> None:
        """Brings `packed` into the layout of the device it is on."""
        by_rows = self.packed.device.type == "cuda"
        if by_rows != (self.packed.ndim == 2):
            self.packed = to_rows(self.packed, self.shape[0]) if by_rows else to_blocks(self.packed)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any], *rest: Any):
        found = state_dict.get(prefix + "packed")
        if isinstance(found, Tensor) and found.ndim != self.packed.ndim and found.ndim in (2, 4):
            if metadata.get("assign_to_params_buffers"):  # it stays on its device
                by_rows = found.ndim == 2
                self.packed = self.packed.new_empty(_packed_shape(*self.shape, by_rows))
            else:
                found = to_blocks(found) if found.ndim == 2 else to_rows(found, self.shape[0])
                state_dict = {**state_dict, prefix + "packed": found}
        super()._load_from_state_dict(state_dict, prefix, metadata, *rest)

    def get_extra_state(self) -> Tensor:
        return torch.tensor([LAYOUT, *self.shape])

    def set_extra_state(self, state: Tensor) -> None:
        version, *shape = state.tolist()
        checks.stored_layout("Int8Weight", version, LAYOUT)
        if tuple(shape) != self.shape:
            raise checks.invalid("Int8Weight", "the state", f"be of shape {self.shape}", f"shape {tuple(shape)}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, whole or not at all."""
        from safetensors.torch import save_file

        tensors = {name: in_file(x).detach().cpu().contiguous() for name, x in self.named_buffers()}
        metadata = {"format": FORMAT, "layout": str(LAYOUT), "shape": " ".join(map(str, self.shape))}
        with files.replacing(Path(path)) as temporary:
            save_file(tensors, temporary, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, mmap: bool = False) -> Int8Weight:
        """Reads what `save` wrote.

        Args:
            path: the file.
            mmap: leave the values in the file's pages, shared between processes and read on first use, instead of
                copying them to memory of their own (on huge pages: 10% to 20% faster to stream).

        Raises: ValueError where the file is truncated, of another kind, or holds a tensor of another dtype or shape.
        """
        from safetensors import SafetensorError, safe_open

        op = f"Int8Weight.load: {path}"
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise checks.invalid(op, "the file", "hold an Int8Weight", f"format {metadata.get('format')!r}")
                layout, shape = metadata.get("layout", ""), metadata.get("shape", "").split()
                checks.stored_layout(op, int(layout) if layout.isdigit() else layout, LAYOUT)
                if len(shape) != 2 or not all(size.isdigit() and int(size) for size in shape):
                    raise checks.invalid(op, "the shape", "be two sizes, N and K", repr(metadata.get("shape")))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise checks.invalid(op, "the file", "be a whole safetensors file", str(error)) from error
        weight = cls(int(shape[0]), int(shape[1]), device="meta")
        for name, expected in weight.named_buffers():
            found = tensors.get(name)
            checks.stored_tensor(op, name, found, expected.dtype, tuple(expected.shape))
            if not mmap:
                found = _huge_pages(torch.empty_like(found)).copy_(found)
            setattr(weight, name, found)
        return weight


def in_file(buffer: Tensor) -> Tensor:
    """A buffer of an Int8Weight as files hold it."""
    return to_blocks(buffer) if buffer.dtype == torch.int8 and buffer.ndim == 2 else buffer


def _huge_pages(x: Tensor) -> Tensor:
    """Asks the system for huge pages under a large CPU tensor that nobody has written yet."""
    if x.device.type == "cpu" and native.available_isas():
        native.cpu().advise_huge_pages(x.data_ptr(), x.numel())
    return x


def rounded_rows(op: str, x: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
    """int8 and fp32 scales of the rows of x [N, K], as `quantize_int8` has them; `first`: the number of x's first."""
    absmax = torch.maximum(x.amax(1), -x.amin(1))
    checks.finite_weight(op, absmax, first)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    scales = (absmax.to(wide) / 127).float()
    divisor = torch.where(scales == 0, torch.inf, scales).to(wide)
    return (x.to(wide) / divisor[:, None]).round_().clamp_(-127, 127).to(torch.int8), scales


def quantize_int8(weight: Tensor | Sequence[Tensor]) -> Int8Weight:
    """Rounds a weight to int8 with one absmax scale per output channel, and packs it for the kernels.

    ``scales[n] = max_k |weight[n, k]| / 127`` and ``q[n, k] = round(weight[n, k] / scales[n])``, ties to even; a
    channel of zeros has scale 0.

    Args:
        weight: [N, K] fp16|bf16|fp32|fp64, as nn.Linear(K, N).weight; or several with one K, which are stacked along N
            (q, k, v and fc_in of a block that one LayerNorm feeds) without ever being concatenated.

    Returns:
        An Int8Weight on the device of `weight`; beside it at most 16 Mi elements of the weight are held at a time.

    Raises:
        ValueError: a weight that is not a matrix, of another K than the first, or with NaN or Inf. TypeError: a dtype.

    Source: Dettmers et al., arXiv 2208.07339, section 2 (vector-wise quantisation).
    """
    op = "quantize_int8"
    matrices = [weight] if isinstance(weight, Tensor) else weight
    checks.float_matrices(op, matrices)
    n, k = sum(len(x) for x in matrices), matrices[0].shape[1]
    result = Int8Weight(n, k, device=matrices[0].device)
    result.packed.zero_()
    result.column_sums.zero_()
    blocks = result.packed.view(torch.int32)[..., 0].transpose(1, 2) if result.packed.ndim == 4 else None
    at = 0
    for matrix in matrices:
        for part in matrix.detach().split(max(1, _ROWS_AT_ONCE // k)):
            q, scales = rounded_rows(op, part, at)
            if blocks is None:
                result.packed[at : at + len(part), :k] = q
            else:  # [ceil(N / 32), 32, K groups]: one row of q along the last dimension
                index = torch.arange(at, at + len(part), device=part.device)
                blocks[index // BLOCK, index % BLOCK] = torch.nn.functional.pad(q, (0, -k % K_STEP)).view(torch.int32)
            result.scales[at : at + len(part)] = scales
            result.row_sums[at : at + len(part)] = q.sum(1, dtype=torch.int32)
            result.column_sums += q.sum(0, dtype=torch.int32)
            at += len(part)
    return result
