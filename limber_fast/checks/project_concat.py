"""What project_concat asks of its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from limber_fast.checks.general import (
    FLOATS,
    dense,
    floating,
    integer,
    invalid,
    kind_of,
    rank,
    real,
    same_device,
    same_dtype,
    shape_of,
    vector,
)


def image_features(op: str, x: Tensor) -> None:
    dense(op, "features", x, "[n_images, k, D]")
    floating(op, "features", x)
    rank(op, "features", x, "[n_images, k, D]", "reshape it: features.reshape(n_images, k, -1)")
    if x.shape[1] == 0 or x.shape[2] == 0:
        raise invalid(op, "features", "be [n_images, k, D] with k and D of at least 1", shape_of(x))


def projection(op: str, weight: Tensor, features: Tensor) -> None:
    rank(op, "weight", weight, "[E, D]")
    if weight.shape[1] != features.shape[2] or weight.shape[0] == 0:
        raise invalid(op, "weight", f"be [E, D] with the D = {features.shape[2]} of features", shape_of(weight))
    same_dtype(op, "weight", weight, "features", features)
    same_device(op, "weight", weight, "features", features)


def token_ids(op: str, input_ids: Tensor, features: Tensor) -> None:
    dense(op, "input_ids", input_ids, "[B, S]")
    integer(op, "input_ids", input_ids)
    rank(op, "input_ids", input_ids, "[B, S]", "one row per prompt: input_ids[None]")
    same_device(op, "input_ids", input_ids, "features", features)


def token_id(op: str, name: str, x: Any) -> None:
    if isinstance(x, bool) or not isinstance(x, (int, Integral)):
        raise invalid(op, name, "be an integer", kind_of(x), f"convert it: int({name})", kind=TypeError)


def word_embedding(op: str, embedding: Any, weight: Tensor) -> None:
    pair = embedding if isinstance(embedding, (tuple, list)) else (embedding, None)
    if len(pair) != 2 or not all(isinstance(x, (Tensor, type(None))) for x in pair) or pair[0] is None:
        contract = "be a tensor [V, E] or a pair (int8 [V, E], scales [V])"
        raise invalid(op, "embedding", contract, kind_of(embedding), kind=TypeError)
    table, scales = pair
    dense(op, "embedding", table, "[V, E]")
    if (table.dtype == torch.int8) != (scales is not None) or (scales is None and table.dtype not in FLOATS):
        contract = "be fp16, bf16, fp32 or fp64, or a pair of int8 [V, E] and its scales [V]"
        found = str(table.dtype) + ("" if scales is None else " with scales")
        raise invalid(op, "embedding", contract, found, kind=TypeError)
    if table.ndim != 2 or table.shape[1] != weight.shape[0] or table.shape[0] == 0:
        raise invalid(op, "embedding", f"be [V, E] with the E = {weight.shape[0]} of weight", shape_of(table))
    same_device(op, "embedding", table, "weight", weight)
    if scales is not None:
        vector(op, "embedding scales", scales, table.shape[0], "V", "weight", weight)
        floating(op, "embedding scales", scales)
    if torch.is_grad_enabled() and (table.requires_grad or (scales is not None and scales.requires_grad)):
        remedy = "no gradient reaches it: detach it, or requires_grad_(False)"
        raise invalid(op, "embedding", "be frozen", "a tensor that requires grad", remedy)


def dropout(op: str, p: float, seed: Any) -> None:
    real(op, "dropout_p", p)
    if not 0 <= p < 1:
        raise invalid(op, "dropout_p", "lie in [0, 1)", repr(p), "0 turns it off")
    if seed is None:
        return
    if isinstance(seed, Tensor):
        integer(op, "seed", seed)
        if seed.numel() != 1:
            raise invalid(op, "seed", "be an integer or a tensor with one element", shape_of(seed))
    else:
        token_id(op, "seed", seed)
        if not 0 <= seed < 2**63:
            raise invalid(op, "seed", "lie in [0, 2^63)", repr(seed))


def layer_norm(op: str, found: Any, weight: Tensor) -> None:
    contract = "be None, a torch.nn.LayerNorm(E) or a triple (weight, bias, eps)"
    if not isinstance(found, (tuple, list)):
        raise invalid(op, "layer_norm", contract, kind_of(found), kind=TypeError)
    if len(found) != 3:
        raise invalid(op, "layer_norm", contract, f"{len(found)} of them", kind=TypeError)
    for name, x in zip(("layer_norm weight", "layer_norm bias"), found, strict=False):
        if x is not None:
            vector(op, name, x, weight.shape[0], "E", "weight", weight)
            floating(op, name, x)
    real(op, "layer_norm eps", found[2])
    if not found[2] >= 0:
        raise invalid(op, "layer_norm eps", "not be negative", repr(found[2]))


def normalized_shape(op: str, shape: Sequence[int], weight: Tensor) -> None:
    if tuple(shape) != (weight.shape[0],):
        raise invalid(op, "layer_norm", f"normalize over the E = {weight.shape[0]} of weight", f"shape {tuple(shape)}")


def image_tokens(op: str, rows: Sequence[Sequence[int]], token: int, n_images: int, k: int, vocabulary: int) -> None:
    """Every run of image tokens is whole images, one for each in features, and other ids are rows of embedding."""
    images, last = 0, None  # `last`: the row of the last run that has an image
    for number, row in enumerate(rows):
        for is_image, run in groupby(row, lambda found: found == token):
            length = sum(1 for _ in run)
            if is_image and length % k:
                contract = f"hold image tokens in runs of a multiple of k = {k}"
                raise invalid(op, "input_ids", contract, f"a run of {length} in row {number}", "each image takes k")
            images += is_image * (length // k)
            if is_image and images - length // k < n_images:
                last = number
    if images != n_images:
        contract = f"have a run of k = {k} image tokens for each of the {n_images} images in features"
        where = "" if last is None else f", the last image in row {last}"
        raise invalid(op, "input_ids", contract, f"runs for {images} images", f"image_token_id is {token}{where}")
    for number, row in enumerate(rows):
        for found in row:
            if found != token and not 0 <= found < vocabulary:
                contract = f"lie in [0, V) with V = {vocabulary}, image_token_id = {token} apart"
                raise invalid(op, "input_ids", contract, f"{found} in row {number}", "they index rows of embedding")
