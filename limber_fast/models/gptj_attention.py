"""GPT-J's attention: rotary positions, and `prefix_attention` over a cache in pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from limber_fast.cache import PagePool, page_size_of
from limber_fast.cache import Sequence as CachedSequence
from limber_fast.models.gptj_config import GPTJConfig
from limber_fast.ops.prefix_attention import PagedBatch, prefix_attention, rotary_table


@lru_cache(maxsize=8)
def rotary(positions: int, rotary_dim: int, device: torch.device) -> Tensor:
    """`limber_fast.rotary_table`, made once."""
    with torch.inference_mode(False):  # an inference tensor could not be part of training later
        return rotary_table(positions, rotary_dim, device=device)


def rotations(config: GPTJConfig, positions: Tensor) -> Tensor:
    """[T, rotary_dim / 2] complex: what each pair of each token's queries and keys is multiplied by."""
    table = rotary(config.n_positions, config.rotary_dim, positions.device)
    return torch.view_as_complex(table.unflatten(-1, (-1, 2)))[positions]


def _rotate_(x: Tensor, rotation: Tensor) -> Tensor:
    """x [T, 3, H, D] in place: of q and k, neighbours within the first rotary_dim dimensions are complex numbers."""
    part = x[:, :2, :, : 2 * rotation.shape[-1]]
    wide = part.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))
    turned = torch.view_as_complex(wide.contiguous()) * rotation[:, None, None, :]
    part.copy_(torch.view_as_real(turned).flatten(-2))
    return x


def rotate(qkv: Tensor, rotation: Tensor) -> Tensor:
    """Rotary positions of q and k in qkv [T, 3, H, D], which is overwritten; rotation [T, rotary_dim / 2] complex."""
    if torch.is_grad_enabled() and qkv.requires_grad:
        return _Rotate.apply(qkv, rotation)
    return _rotate_(qkv, rotation)


class _Rotate(torch.autograd.Function):
    """In place both ways: q, k and v stay the one buffer that their product wrote, and nothing else is saved."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, rotation: Tensor) -> Tensor:
        ctx.save_for_backward(rotation)
        ctx.mark_dirty(qkv)
        return _rotate_(qkv, rotation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rotation,) = ctx.saved_tensors
        return _rotate_(grad.clone(), rotation.conj()), None


class KVCache:
    """Keys and values of B sequences, in pages of a pool; forks share what they have in common.

    Attributes:
        pool, sequences: where the tokens lie. positions: the rotary position of each sequence's next token.
        lengths: tokens held, per sequence.
    """

    def __init__(self, pool: PagePool, sequences: Sequence[CachedSequence], positions: Sequence[int] | None = None):
        self.pool, self.sequences = pool, list(sequences)
        self.positions = self.lengths if positions is None else list(positions)

    @classmethod
    def for_tokens(
        cls, config: GPTJConfig, lengths: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        """Empty, with a pool for so many tokens of each sequence; memory is taken as it fills."""
        size = page_size_of(dtype)
        pages = sum(-(-length // size) for length in lengths)
        shape = config.n_layer, config.n_head, config.head_dim
        pool = PagePool(*shape, dtype=dtype, device=device, budget_bytes=pages * PagePool.bytes_of_page(*shape, dtype))
        return cls(pool, [pool.sequence() for _ in lengths])

    @property
    def lengths(self) -> list[int]:
        return [sequence.length for sequence in self.sequences]

    @contextmanager
    def step(self, new: Sequence[int], positions: list[int] | None) -> Iterator[PagedBatch]:
        """Room for new tokens of each sequence, at `positions` or else where the sequences stopped; taken back where
        the block raises."""
        before = self.positions, self.lengths
        if positions is None and self.positions != self.lengths:
            positions = [start + i for start, n in zip(self.positions, new, strict=True) for i in range(n)]
        batch = self.pool.batch(self.sequences, new, positions=positions)
        if positions is None:
            self.positions = self.lengths
        else:
            self.positions = [positions[end - 1] + 1 for end in accumulate(new)]
        try:
            yield batch
        except BaseException:
            self.truncate(before[1])
            self.positions = before[0]
            raise

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forgets all but the first tokens of each sequence."""
        for row, (sequence, length) in enumerate(zip(self.sequences, lengths, strict=True)):
            self.positions[row] -= sequence.length - length
            sequence.truncate(length)

    def fork(self, rows: Sequence[int]) -> KVCache:
        """A cache of copies of these sequences, a row any number of times: pages are shared until one writes."""
        return KVCache(self.pool, [self.sequences[r].fork() for r in rows], [self.positions[r] for r in rows])

    def keep(self, rows: Sequence[int]) -> None:
        """Releases all sequences but these, which follow in this order."""
        kept = [self.sequences[row] for row in rows]
        for sequence in self.sequences:
            if not any(sequence is other for other in kept):
                sequence.release()
        self.sequences, self.positions = kept, [self.positions[row] for row in rows]

    def release(self) -> None:
        """Gives all pages back to the pool."""
        self.keep([])


class Prefix:
    """A prompt's beginning, computed once, that any number of prompts go on from: `GPTJ.prefix` makes it.

    A context manager: its memory is given back at the end.

    Attributes:
        cache: of one sequence. length: its tokens. model: whose keys and values they are.
    """

    def __init__(self, cache: KVCache, model: Any) -> None:
        self.cache, self.model = cache, model

    @property
    def length(self) -> int:
        return self.cache.lengths[0] if self.cache.sequences else 0

    def release(self) -> None:
        self.cache.release()

    def __enter__(self) -> Prefix:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


def cached_attention(config: GPTJConfig, cache: KVCache, batch: PagedBatch) -> Callable[[Tensor, int], Tensor]:
    """(q|k|v [T, 3 E] of new tokens, layer) -> [T, E], over the cache, which grows by them."""
    table = rotary(config.n_positions, config.rotary_dim, cache.pool.storage.device)

    def attend(qkv: Tensor, layer: int) -> Tensor:
        q, k, v = qkv.view(-1, 3, config.n_head, config.head_dim).unbind(1)
        pages, scales = cache.pool.layer(layer), cache.pool.layer_scales(layer)
        return prefix_attention(q, k, v, pages, batch, page_scales=scales, rotary=table).flatten(1)

    return attend
