"""Shapes, data and error bounds of the ops, shared by tests and benchmarks."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# N, M, D: every ragged size in every place, and no multiple of a tile.
SQUARE = ((1, 1, 7), (7, 7, 1), (7, 7, 2048), (123, 123, 640), (640, 640, 123), (1023, 1023, 7))
RECTANGULAR = ((1, 123, 7), (7, 1, 123), (123, 640, 1), (640, 7, 123), (1023, 123, 640), (123, 1023, 64))
LARGE = (2048, 2048, 123)

# Relative error that is granted without a comparison: about one rounding of the result in its own dtype (fp32: the
# 1e-6 of the design). Everything above it must stay within twice the error of eager PyTorch in the same dtype.
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 1e-12}


def _directions(rows: int, d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, d, generator=generator, dtype=torch.float64), dim=1)


def unit(n: int, m: int, d: int) -> tuple[Tensor, Tensor, float]:
    """Random directions at CLIP's initial scale."""
    return _directions(n, d, 1), _directions(m, d, 2), 1 / 0.07


def below(n: int, m: int, d: int) -> tuple[Tensor, Tensor, float]:
    """All similarities below -0.04 at scale 100: a kernel that shifts by the largest possible logit underflows."""
    axis = F.one_hot(torch.tensor(0), d).double()
    image, text = axis + 0.4 * _directions(n, d, 3), -axis + 0.4 * _directions(m, d, 4)
    return F.normalize(image, dim=1), F.normalize(text, dim=1), 100.0


def wild(n: int, m: int, d: int) -> tuple[Tensor, Tensor, float]:
    """Row norms over four decades: logits from 1e-3 to 1e4 side by side in one tile."""
    generator = torch.Generator().manual_seed(5)
    norms = [10 ** (torch.rand(rows, 1, generator=generator, dtype=torch.float64) * 2 - 1) for rows in (n, m)]
    return _directions(n, d, 6) * norms[0], _directions(m, d, 7) * norms[1], 100.0


def offset(n: int, m: int, d: int) -> tuple[Tensor, Tensor, float]:
    """A shared component that makes every similarity nearly 1: what d loss / d scale sees is the small rest."""
    axis = F.one_hot(torch.tensor(d - 1), d).double()
    image, text = axis + 0.1 * _directions(n, d, 8), axis + 0.1 * _directions(m, d, 9)
    return F.normalize(image, dim=1), F.normalize(text, dim=1), 100.0


def converged(n: int, m: int, d: int) -> tuple[Tensor, Tensor, float]:
    """Pairs that agree, at scale 100: losses far below the rounding error of the log-sum-exp."""
    image = _directions(n, d, 10)
    return image, F.normalize(image[torch.arange(m) % n] + 1.5 * _directions(m, d, 11), dim=1), 100.0


def opposed(n: int, m: int, d: int) -> tuple[Tensor, Tensor, float]:
    """Every other row far below all logits of its neighbours: no shift serves a tile of both; a 0 is large to some."""
    axis = F.one_hot(torch.tensor(0), d).double()
    image = torch.where(torch.arange(n)[:, None] % 2 == 1, 0.4 * _directions(n, d, 14) - axis, _directions(n, d, 15))
    return F.normalize(image, dim=1), F.normalize(axis + 0.4 * _directions(m, d, 16), dim=1), 100.0


def peak(n: int, m: int, d: int) -> tuple[Tensor, Tensor, float]:
    """One row so far above all others, which are like each other, that a maximum that misses it overflows."""
    axis = F.one_hot(torch.tensor(0), d).double()
    image = _directions(n, d, 17)
    image[min(n - 1, 127)] = axis
    return image, F.normalize(axis + 0.4 * _directions(m, d, 18), dim=1), 250.0


def peak_column(n: int, m: int, d: int) -> tuple[Tensor, Tensor, float]:
    text, image, scale = peak(m, n, d)
    return image, text, scale


def peaks(n: int, m: int, d: int) -> tuple[Tensor, Tensor, float]:
    """Every row's and every column's largest logit in another place, beside its positive, and far above all others."""
    image = _directions(n, d, 20)
    return image, F.normalize(image[torch.arange(m).roll(7) % n] + 0.3 * _directions(m, d, 21), dim=1), 250.0


DATA = {f.__name__: f for f in (unit, below, wild, offset, converged, opposed)}
PEAKS = {f.__name__: f for f in (peak, peak_column, peaks)}


@lru_cache(maxsize=64)
def towers(data: str, n: int, m: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """image [n, d], text [m, d] in `dtype` and the logit scale of a named kind of data."""
    image, text, scale = (DATA | PEAKS)[data](n, m, d)
    return image.to(dtype), text.to(dtype), scale


def permutation(n: int, seed: int = 12) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def labels(n: int, m: int, seed: int = 13) -> Tensor:
    return torch.randint(m, (n,), generator=torch.Generator().manual_seed(seed))


def errors(found: Tensor, true: Tensor) -> tuple[float, float]:
    """Relative error of `found` in the Euclidean norm and in the largest entry."""
    difference, true = found.double() - true.double(), true.double()
    return tuple(
        (norm(difference) / norm(true).clamp_min(torch.finfo(torch.float64).tiny)).item()
        for norm in (torch.linalg.vector_norm, lambda x: x.abs().max())
    )


def eager_info_nce(
    image: Tensor, text: Tensor, logit_scale: Tensor, *, logit_bias: Tensor | None = None,
    labels: Tensor | None = None, normalize: bool = False, variant: str = "softmax", symmetric: bool = True,
) -> Tensor:  # fmt: skip
    """Per-row loss as a careful engineer writes it in eager PyTorch: one logits matrix, losses in fp32."""
    if normalize:
        image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
    logits = ((logit_scale * image) @ text.T).float()
    logits = logits if logit_bias is None else logits + logit_bias
    column = torch.arange(len(image)) if labels is None else labels
    if variant == "sigmoid":
        sign = 2 * F.one_hot(column, len(text)).to(logits.dtype) - 1
        return -F.logsigmoid(sign * logits).sum(1)
    loss = F.cross_entropy(logits, column, reduction="none")
    if not symmetric:
        return loss
    return (loss + F.cross_entropy(logits.T, column.argsort(), reduction="none")[column]) / 2


# Prompts as strings, one per row: 'i' is an image (k image tokens), 't' a text token; shorter rows end in text.
PROMPTS = {
    "one image a row": ("ittt", "itttt", "ittttt"),
    "few-shot": ("itttitt", "tit", "tiit", "ttt"),
    "image last": ("tti", "ttti"),
    "images alone": ("ii", "ii"),
    "one image": ("titt",),
}
IMAGE_TOKEN, VOCABULARY = 900, 61

# k, D, E: every ragged size in every place; few rows, whole tiles and more rows than one block sums.
PROJECTIONS = (
    (1, 7, 5), (1, 1025, 96), (1, 1024, 75), (3, 64, 33), (49, 64, 130), (5, 640, 31), (17, 257, 1023), (260, 40, 48),
)  # fmt: skip


def prompts(rows: tuple[str, ...], k: int, seed: int = 14) -> Tensor:
    """input_ids [B, S] of PROMPTS' notation."""
    length = max(row.count("t") + k * row.count("i") for row in rows)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (len(rows), length), generator=generator)
    for line, row in enumerate(rows):
        at = 0
        for kind in row:
            if kind == "i":
                ids[line, at : at + k] = IMAGE_TOKEN
            at += k if kind == "i" else 1
    return ids


@lru_cache(maxsize=64)
def projection(images: int, k: int, d: int, e: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Features, projection, embedding and layer norm in `dtype`, at the scale of an encoder and a language model."""
    generator = torch.Generator().manual_seed(15)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    values = {
        "features": normal(images, k, d), "weight": normal(e, d) / d**0.5, "bias": normal(e) / 2,
        "ln_weight": 1 + normal(e) / 4, "ln_bias": normal(e) / 4, "embedding": normal(VOCABULARY, e),
    }  # fmt: skip
    return {name: x.to(dtype) for name, x in values.items()}


def eager_project_concat(
    features: Tensor, weight: Tensor, bias: Tensor | None, input_ids: Tensor, embedding: Tensor, *,
    image_token_id: int, mask: Tensor | None = None, layer_norm: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:  # fmt: skip
    """As one writes it in eager PyTorch; `mask` holds dropout's zeros and 1 / (1 - p), as F.dropout multiplies."""
    soft_prompts = F.linear(features, weight, bias).flatten(0, 1)
    if mask is not None:
        soft_prompts = soft_prompts * mask
    if layer_norm is not None:
        soft_prompts = F.layer_norm(soft_prompts, soft_prompts.shape[1:], *layer_norm)
    is_image = input_ids == image_token_id
    inputs_embeds = F.embedding(input_ids.masked_fill(is_image, 0), embedding).to(features.dtype)
    return inputs_embeds.masked_scatter(is_image[..., None], soft_prompts)


# Encoders of LiMBeR in front of GPT-J: k, D, E, what else the op does, dtype.
ENCODERS = {
    "NF-ResNet50": ((1, 2048, 4096), "dropout", torch.float16),
    "CLIP ViT-B/32": ((49, 512, 4096), "layer norm", torch.float16),
    "CLIP RN50x16": ((144, 3072, 4096), "magma", torch.bfloat16),
    "BEiT-Large": ((196, 1024, 4096), "dropout", torch.float32),
}

# M, N, K of int8 products: every ragged size in every place; one row, a few, whole tiles, and more than one block or
# chunk of the reduction.
INT8_SHAPES = (
    (1, 1, 1), (1, 33, 65), (2, 96, 4100), (5, 31, 130), (13, 64, 64), (16, 65, 1023), (29, 130, 257), (33, 32, 192),
    (67, 161, 71), (300, 40, 4500),
)  # fmt: skip


@lru_cache(maxsize=64)
def int8_layer(m: int, n: int, k: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Activations of a language model in `dtype`: unit rows, few features far to one side, a row of zeros; a weight,
    a bias and a residual at the scale of its layers."""
    generator = torch.Generator().manual_seed(18)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, weight = normal(m, k), normal(n, k) / k**0.5
    x[:, 3 % k] -= 7
    x[::3, k // 2] += 30
    x[m // 2] *= m > 1
    weight[n // 2] *= n > 1
    values = {"x": x, "weight": weight, "bias": normal(n), "residual": normal(m, n), "grad": normal(m, n)}
    return {name: value.to(dtype) for name, value in values.items()}


def eager_int8_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None
) -> Tensor:
    """The layer that int8_linear stands for, with its weight in the dtype of `x`."""
    y = F.linear(x, weight, bias)
    if activation is not None:
        y = F.gelu(y, approximate="tanh")
    return y if residual is None else y + residual


# Rows, vocabulary, features of a language model's head: one row, several blocks of rows, chunks of the vocabulary.
HEAD_SHAPES = (
    (1, 1, 1), (1, 33, 65), (5, 4097, 31), (40, 333, 70), (67, 9000, 161), (300, 130, 500), (600, 4160, 40),
)  # fmt: skip


@lru_cache(maxsize=16)
def head(rows: int, vocabulary: int, d: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Hidden rows after a LayerNorm, a head with logits of a few nats, labels of which every third is missing."""
    generator = torch.Generator().manual_seed(19)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    labels[1::3] = -100
    values = {"hidden": normal(rows, d), "weight": 3 * normal(vocabulary, d) / d**0.5, "bias": normal(vocabulary),
              "grad": normal(rows)}  # fmt: skip
    return {"labels": labels, **{name: value.to(dtype) for name, value in values.items()}}


def eager_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, reduction: str = "mean"
) -> Tensor:
    """As language models have it: all logits, cross entropy in fp32 or wider."""
    z = F.linear(hidden, weight, bias)
    return F.cross_entropy(z if z.dtype == torch.float64 else z.float(), labels, reduction=reduction)


# Sequences of a step as (cached tokens, new tokens): decode and prefill, alone and mixed, ragged, around page ends.
STEPS = {
    "one token alone": ((0, 1),),
    "decode": ((7, 1), (0, 1), (8, 1), (63, 1), (150, 1)),
    "prefill": ((0, 1), (0, 9), (0, 70), (0, 129)),
    "chunks": ((13, 40), (64, 64), (5, 3), (100, 33)),
    "mixed": ((70, 1), (0, 35), (16, 0), (33, 17), (8, 1)),
    "many rows": ((0, 300), (301, 1)),
}
# (page-aligned or not) tokens of nested prefixes, then each member's private (cached, new) tokens.
FORKS = {
    "decode": ((40,), ((0, 1), (3, 1), (17, 1), (8, 1), (1, 1))),
    "many decode": ((93,), tuple((i % 11, 1) for i in range(37))),
    "prefill": ((61,), ((0, 5), (0, 40), (2, 7))),
    "nested": ((16, 48, 75), ((0, 1), (5, 1), (1, 6), (9, 1))),
}


def attention_rows(tokens: int, heads: int, dims: int, dtype: torch.dtype, seed: int = 19, sharp: float = 1.0):
    """q, k, v [tokens, heads, dims]: logits of a spread that softmax neither flattens nor saturates."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, tokens, heads, dims, generator=generator, dtype=torch.float64)
    return (2 * sharp * q).to(dtype), k.to(dtype), v.to(dtype)
