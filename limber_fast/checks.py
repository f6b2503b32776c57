"""The wording of every argument error: op, argument, contract, found, remedy. ValueError for shape and value,
TypeError for dtype and kind."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def invalid(
    op: str, argument: str, contract: str, found: str, remedy: str = "", kind: type[Exception] = ValueError
) -> Exception:
    return kind(f"{op}: {argument} must {contract}; got {found}" + (f"; {remedy}" if remedy else ""))


def _shape(x: Tensor) -> str:
    return f"shape {tuple(x.shape)}"


def _kind(x: Any) -> str:
    return str(x.dtype) if isinstance(x, Tensor) else type(x).__name__


def dense(op: str, name: str, x: Tensor, shape: str) -> None:
    if not isinstance(x, Tensor):
        raise invalid(op, name, f"be a tensor {shape}", _kind(x), "convert it: torch.as_tensor", kind=TypeError)
    if x.is_nested or x.layout != torch.strided:
        found = "a nested tensor" if x.is_nested else str(x.layout)
        raise invalid(op, name, f"be a dense tensor {shape}", found, "convert it, as by to_dense()", kind=TypeError)


def floating(op: str, name: str, x: Tensor) -> None:
    if x.dtype not in _FLOATS:
        remedy = f"convert it: {name}.float()"
        raise invalid(op, name, "be fp16, bf16, fp32 or fp64", _kind(x), remedy, kind=TypeError)


def rank(op: str, name: str, x: Tensor, shape: str, remedy: str = "") -> None:
    if x.ndim != shape.count(",") + 1:
        raise invalid(op, name, f"be {shape}", _shape(x), remedy)


def matrix(op: str, name: str, x: Tensor, shape: str) -> None:
    """A dense floating-point matrix with at least one row and one column."""
    dense(op, name, x, shape)
    floating(op, name, x)
    rank(op, name, x, shape, f"reshape it: {name}.reshape(-1, D)")
    if x.shape[0] == 0 or x.shape[1] == 0:
        raise invalid(op, name, f"be {shape} with at least one row and one feature", _shape(x), "skip empty batches")


def has_data(op: str, name: str, x: Tensor) -> None:
    if x.is_meta:
        remedy = "materialise it, or trace shapes with torch.compile or FakeTensorMode"
        raise invalid(op, name, "hold data", "a tensor on meta", remedy)


def same_features(op: str, name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """`x` has the width, dtype and device of `like`."""
    if x.shape[1] != like.shape[1]:
        remedy = "project both to one width"
        raise invalid(op, name, f"have the D = {like.shape[1]} of {like_name}", _shape(x), remedy)
    same_dtype(op, name, x, like_name, like)
    same_device(op, name, x, like_name, like)


def same_dtype(op: str, name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    if x.dtype != like.dtype:
        remedy = f"convert one: {name}.to({like_name}.dtype), or call under torch.autocast"
        raise invalid(op, name, f"have the dtype of {like_name}, {like.dtype}", _kind(x), remedy, kind=TypeError)


def same_device(op: str, name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    if x.device != like.device:
        remedy = f"move it: {name}.to({like_name}.device)"
        raise invalid(op, name, f"be on the device of {like_name}, {like.device}", str(x.device), remedy)


def number(op: str, name: str, x: float | Tensor) -> None:
    """A real number (Python's, NumPy's or a 0-d array), or a floating-point tensor with one element."""
    if isinstance(x, Tensor):
        if not x.is_floating_point():
            raise invalid(op, name, "be floating point", _kind(x), f"convert it: {name}.float()", kind=TypeError)
        if x.numel() != 1:
            remedy = "one value serves all logits"
            raise invalid(op, name, "be a number or a tensor with one element", _shape(x), remedy)
    elif not (_is_real(x) or (isinstance(x, np.ndarray) and x.ndim == 0 and _is_real(x[()]))):
        remedy = f"convert it: float({name})"
        raise invalid(op, name, "be a number or a tensor with one element", _kind(x), remedy, kind=TypeError)


def _is_real(x: Any) -> bool:
    return isinstance(x, (int, float, Real))  # the builtins first: isinstance asks an ABC slowly


def _real(op: str, name: str, x: Any) -> None:
    if not _is_real(x):
        raise invalid(op, name, "be a number", _kind(x), f"convert it: float({name})", kind=TypeError)


def flag(op: str, name: str, x: Any) -> None:
    if not isinstance(x, bool):
        raise invalid(op, name, "be True or False", repr(x), "pass a bool", kind=TypeError)


def vector(op: str, name: str, x: Tensor, length: int, letter: str, like_name: str, like: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise invalid(op, name, f"be a tensor [{letter}]", _kind(x), "convert it: torch.as_tensor", kind=TypeError)
    if x.ndim != 1 or x.shape[0] != length:
        owner = {"N": "image", "M": "text", "E": "weight", "V": "embedding"}[letter]
        raise invalid(op, name, f"be [{letter}] with {letter} = {length}", _shape(x), f"one value per row of {owner}")
    same_device(op, name, x, like_name, like)


def integer(op: str, name: str, x: Tensor) -> None:
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise invalid(op, name, "be an integer tensor", _kind(x), f"convert it: {name}.long()", kind=TypeError)


def constant_weights(op: str, weights: Tensor) -> None:
    if not weights.is_floating_point():
        raise invalid(op, "weights", "be floating point", _kind(weights), "convert it: weights.float()", kind=TypeError)
    if weights.requires_grad:
        raise invalid(op, "weights", "be constants", "a tensor that requires grad", "detach it: weights.detach()")


def choice(op: str, name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise invalid(op, name, f"be one of {', '.join(map(repr, choices))}", repr(value))


def label_smoothing(op: str, value: float, variant: str) -> None:
    _real(op, "label_smoothing", value)
    if not 0 <= value < 1:
        raise invalid(op, "label_smoothing", "lie in [0, 1)", repr(value), "0 turns it off")
    if value and variant == "sigmoid":
        raise invalid(op, "label_smoothing", "be 0 with variant='sigmoid', which has no softmax to smooth", repr(value))


def not_negative(op: str, name: str, value: float) -> None:
    _real(op, name, value)
    if not value >= 0:
        raise invalid(op, name, "not be negative", repr(value), "0 turns it off")


def square(op: str, n: int, m: int) -> None:
    if n != m:
        found = f"image with N = {n} rows and text with M = {m}"
        raise invalid(op, "labels", "be given where N and M differ", found, "pass labels=[N] and symmetric=False")


def symmetric_rectangle(op: str, n: int, m: int) -> None:
    if n != m:
        remedy = "text rows without a positive have no loss: pass symmetric=False"
        raise invalid(op, "symmetric", "be False where N and M differ", f"True with N = {n}, M = {m}", remedy)


def label_range(op: str, low: int, high: int, m: int) -> None:
    if low < 0 or high >= m:
        found = f"values from {low} to {high}"
        raise invalid(op, "labels", f"lie in [0, M) with M = {m}", found, "they index rows of text")


def permutation(op: str, is_permutation: bool) -> None:
    if not is_permutation:
        remedy = "pass symmetric=False for the image-to-text loss alone"
        raise invalid(op, "labels", "be a permutation where symmetric=True", "repeated values", remedy)


def id_pair(op: str, ids: Any) -> None:
    if not (isinstance(ids, (tuple, list)) and len(ids) == 2):
        found = f"{len(ids)} of them" if isinstance(ids, (tuple, list)) else _kind(ids)
        raise invalid(op, "ids", "be a tensor [N] or a pair (image_ids [N], text_ids [M])", found, kind=TypeError)


def shared_ids(op: str, n: int, m: int) -> None:
    if n != m:
        remedy = "pass a pair (image_ids [N], text_ids [M])"
        raise invalid(op, "ids", "be a pair where N and M differ", f"one tensor with N = {n}, M = {m}", remedy)


def single_process(op: str, found: dict[str, Any]) -> None:
    """Constructor arguments of a distributed loss that this class does not take on."""
    if found:
        given = ", ".join(f"{name}={value!r}" for name, value in found.items())
        raise invalid(op, "the loss", "be built for one process (world_size=1, rank=0)", given)


def image_features(op: str, x: Tensor) -> None:
    dense(op, "features", x, "[n_images, k, D]")
    floating(op, "features", x)
    rank(op, "features", x, "[n_images, k, D]", "reshape it: features.reshape(n_images, k, -1)")
    if x.shape[1] == 0 or x.shape[2] == 0:
        raise invalid(op, "features", "be [n_images, k, D] with k and D of at least 1", _shape(x))


def projection(op: str, weight: Tensor, features: Tensor) -> None:
    rank(op, "weight", weight, "[E, D]")
    if weight.shape[1] != features.shape[2] or weight.shape[0] == 0:
        raise invalid(op, "weight", f"be [E, D] with the D = {features.shape[2]} of features", _shape(weight))
    same_dtype(op, "weight", weight, "features", features)
    same_device(op, "weight", weight, "features", features)


def token_ids(op: str, input_ids: Tensor, features: Tensor) -> None:
    dense(op, "input_ids", input_ids, "[B, S]")
    integer(op, "input_ids", input_ids)
    rank(op, "input_ids", input_ids, "[B, S]", "one row per prompt: input_ids[None]")
    same_device(op, "input_ids", input_ids, "features", features)


def token_id(op: str, name: str, x: Any) -> None:
    if isinstance(x, bool) or not isinstance(x, (int, Integral)):
        raise invalid(op, name, "be an integer", _kind(x), f"convert it: int({name})", kind=TypeError)


def word_embedding(op: str, embedding: Any, weight: Tensor) -> None:
    pair = embedding if isinstance(embedding, (tuple, list)) else (embedding, None)
    if len(pair) != 2 or not all(isinstance(x, (Tensor, type(None))) for x in pair) or pair[0] is None:
        contract = "be a tensor [V, E] or a pair (int8 [V, E], scales [V])"
        raise invalid(op, "embedding", contract, _kind(embedding), kind=TypeError)
    table, scales = pair
    dense(op, "embedding", table, "[V, E]")
    if (table.dtype == torch.int8) != (scales is not None) or (scales is None and table.dtype not in _FLOATS):
        contract = "be fp16, bf16, fp32 or fp64, or a pair of int8 [V, E] and its scales [V]"
        found = str(table.dtype) + ("" if scales is None else " with scales")
        raise invalid(op, "embedding", contract, found, kind=TypeError)
    if table.ndim != 2 or table.shape[1] != weight.shape[0] or table.shape[0] == 0:
        raise invalid(op, "embedding", f"be [V, E] with the E = {weight.shape[0]} of weight", _shape(table))
    same_device(op, "embedding", table, "weight", weight)
    if scales is not None:
        vector(op, "embedding scales", scales, table.shape[0], "V", "weight", weight)
        floating(op, "embedding scales", scales)
    if torch.is_grad_enabled() and (table.requires_grad or (scales is not None and scales.requires_grad)):
        remedy = "no gradient reaches it: detach it, or requires_grad_(False)"
        raise invalid(op, "embedding", "be frozen", "a tensor that requires grad", remedy)


def dropout(op: str, p: float, seed: Any) -> None:
    _real(op, "dropout_p", p)
    if not 0 <= p < 1:
        raise invalid(op, "dropout_p", "lie in [0, 1)", repr(p), "0 turns it off")
    if seed is None:
        return
    if isinstance(seed, Tensor):
        integer(op, "seed", seed)
        if seed.numel() != 1:
            raise invalid(op, "seed", "be an integer or a tensor with one element", _shape(seed))
    else:
        token_id(op, "seed", seed)
        if not 0 <= seed < 2**63:
            raise invalid(op, "seed", "lie in [0, 2^63)", repr(seed))


def layer_norm(op: str, found: Any, weight: Tensor) -> None:
    contract = "be None, a torch.nn.LayerNorm(E) or a triple (weight, bias, eps)"
    if not isinstance(found, (tuple, list)):
        raise invalid(op, "layer_norm", contract, _kind(found), kind=TypeError)
    if len(found) != 3:
        raise invalid(op, "layer_norm", contract, f"{len(found)} of them", kind=TypeError)
    for name, x in zip(("layer_norm weight", "layer_norm bias"), found, strict=False):
        if x is not None:
            vector(op, name, x, weight.shape[0], "E", "weight", weight)
            floating(op, name, x)
    _real(op, "layer_norm eps", found[2])
    if not found[2] >= 0:
        raise invalid(op, "layer_norm eps", "not be negative", repr(found[2]))


def normalized_shape(op: str, shape: Sequence[int], weight: Tensor) -> None:
    if tuple(shape) != (weight.shape[0],):
        raise invalid(op, "layer_norm", f"normalize over the E = {weight.shape[0]} of weight", f"shape {tuple(shape)}")


def image_tokens(op: str, rows: Sequence[Sequence[int]], token: int, n_images: int, k: int, vocabulary: int) -> None:
    """Every run of image tokens is whole images, one for each in features, and other ids are rows of embedding."""
    images = 0
    for number, row in enumerate(rows):
        for is_image, run in groupby(row, lambda found: found == token):
            length = sum(1 for _ in run)
            if is_image and length % k:
                contract = f"hold image tokens in runs of a multiple of k = {k}"
                raise invalid(op, "input_ids", contract, f"a run of {length} in row {number}", "each image takes k")
            images += is_image * (length // k)
    if images != n_images:
        contract = f"have a run of k = {k} image tokens for each of the {n_images} images in features"
        raise invalid(op, "input_ids", contract, f"runs for {images} images", f"image_token_id is {token}")
    for number, row in enumerate(rows):
        for found in row:
            if found != token and not 0 <= found < vocabulary:
                contract = f"lie in [0, V) with V = {vocabulary}, image_token_id = {token} apart"
                raise invalid(op, "input_ids", contract, f"{found} in row {number}", "they index rows of embedding")
