"""project_concat in plain, differentiable PyTorch, and its dropout mask in NumPy's unsigned integers."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def random_words(seed: int, rows: int, columns: int) -> np.ndarray:
    """[rows, columns] uint32: the word of column e of soft prompt r, which is dropped where it lies below p 2^32.

    A counter hash: nothing is drawn in sequence, so that any part of the mask can be made anew, anywhere. A 64-bit
    finaliser (splitmix64's) mixes the seed, then each row; its two halves key a 32-bit mix of the column (two rounds of
    xor-shift and multiply, Wellons' lowbias32), the second half entering between the rounds.
    """

    def mix64(z: np.ndarray) -> np.ndarray:
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    step = np.uint64(0x9E3779B97F4A7C15)
    start = mix64(np.array([seed], dtype=np.uint64) + step)
    key = mix64(start + np.arange(1, rows + 1, dtype=np.uint64) * step)[:, None]
    x = np.arange(columns, dtype=np.uint32) + key.astype(np.uint32)
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) + (key >> np.uint64(32)).astype(np.uint32)
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def kept(seed: int, dropout_p: float, rows: int, columns: int) -> Tensor:
    """[rows, columns] bool: what dropout leaves. Row r is soft prompt r % k of image r // k."""
    threshold = min(int(dropout_p * 2**32 + 0.5), 2**32 - 1)
    return torch.from_numpy(random_words(seed, rows, columns) >= np.uint32(threshold))


def project_concat(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_ids: Tensor,
    embedding: Tensor | tuple[Tensor, Tensor],
    *,
    image_token_id: int,
    dropout_p: float = 0.0,
    seed: int = 0,
    layer_norm: tuple[Tensor | None, Tensor | None, float] | None = None,
) -> Tensor:
    """The inputs_embeds of `limber_fast.project_concat`, row by row."""
    soft_prompts = F.linear(features.flatten(0, 1), weight, bias)
    if dropout_p:
        mask = kept(seed, dropout_p, *soft_prompts.shape).to(soft_prompts.device)
        soft_prompts = soft_prompts * mask / (1 - dropout_p)
    if layer_norm is not None:
        soft_prompts = F.layer_norm(soft_prompts, soft_prompts.shape[1:], *layer_norm)

    images, rows = iter(soft_prompts.unbind(0)), []
    for token in input_ids.reshape(-1).tolist():
        if token == image_token_id:
            rows.append(next(images))
        elif isinstance(embedding, tuple):
            rows.append(embedding[0][token].to(features.dtype) * embedding[1][token].to(features.dtype))
        else:
            rows.append(embedding[token].to(features.dtype))
    if next(images, None) is not None:
        raise ValueError("more soft prompts than image tokens")
    return torch.stack(rows).reshape(*input_ids.shape, -1)
