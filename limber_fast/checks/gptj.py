"""What GPTJ asks of its arguments, and of the files that hold one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from limber_fast.checks.general import dense, floating, integer, invalid, kind_of, same_device, shape_of


def size(op: str, name: str, found: Any) -> None:
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise invalid(op, name, "be a whole number of at least 1", repr(found))


def exactly_one(op: str, **given: Any) -> None:
    found = [name for name, value in given.items() if value is not None]
    if len(found) != 1:
        raise invalid(op, " or ".join(given), "be given, exactly one of them", " and ".join(found) or "neither")


def ids_in_vocabulary(op: str, name: str, ids: Tensor, vocabulary: int) -> None:
    integer(op, name, ids)
    if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < vocabulary):
        found = f"ids from {int(ids.min())} to {int(ids.max())}"
        raise invalid(op, name, f"lie within [0, V) with V = {vocabulary}", found)


def whole_rows(op: str, name: str, x: Any, shape: str, like: Tensor) -> None:
    dense(op, name, x, shape)
    if x.ndim != shape.count(",") + 1 or 0 in x.shape:
        raise invalid(op, name, f"be {shape}, none of them 0", shape_of(x))
    same_device(op, name, x, "the model", like)


def embeddings(op: str, name: str, x: Tensor, width: int) -> None:
    floating(op, name, x)
    if x.shape[-1] != width:
        raise invalid(op, name, f"be as wide as the model, E = {width}", shape_of(x))


def beside(op: str, name: str, x: Any, shape: tuple[int, int], like: Tensor) -> None:
    """[B, S] of integers or booleans that go with the tokens."""
    dense(op, name, x, "[B, S]")
    if x.is_floating_point() or x.is_complex():
        raise invalid(op, name, "be integers", kind_of(x), f"convert it: {name}.long()", kind=TypeError)
    if x.shape != shape:
        raise invalid(op, name, f"be {tuple(shape)}, one value per token", shape_of(x))
    same_device(op, name, x, "the model", like)


def no_empty_row(op: str, name: str, lengths: list[int]) -> None:
    if 0 in lengths:
        raise invalid(op, name, "leave at least one token in every row", f"none in row {lengths.index(0)}")


def within_context(op: str, positions: int, limit: int, remedy: str = "shorten the prompt") -> None:
    if positions > limit:
        raise invalid(op, "the sequence", f"have at most n_positions = {limit} tokens", str(positions), remedy)


def model_dtype(op: str, dtype: Any) -> None:
    if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise invalid(op, "dtype", "be torch.bfloat16, float16, float32 or float64", repr(dtype), kind=TypeError)


def listed_texts(op: str, name: str, found: Any, of: str = "texts") -> list:
    """Several texts, or lists of token ids, as a list: one text alone would be taken for its letters."""
    if isinstance(found, str) or not hasattr(found, "__iter__"):
        raise invalid(op, name, f"be a list of {of}", kind_of(found), "put it into a list", kind=TypeError)
    return list(found)


def text(op: str, name: str, found: Any) -> None:
    if not isinstance(found, str):
        raise invalid(op, name, "be a text", kind_of(found), kind=TypeError)


def pictures(op: str, found: Any) -> None:
    if not isinstance(found, list):
        remedy = "put it into a list"
        raise invalid(op, "images", "be a list of pictures or a tensor", kind_of(found), remedy, kind=TypeError)
    if not found:
        raise invalid(op, "images", "be at least one", "none")
    for x in found:
        if not hasattr(x, "convert"):
            raise invalid(op, "images", "be PIL images", kind_of(x), "PIL.Image.open(path)", kind=TypeError)


def shots(op: str, found: Any) -> list:
    """(picture, question, answer) each."""
    found = listed_texts(op, "shots", found, "(picture, question, answer)")
    for row, shot in enumerate(found):
        contract = "be (picture, question, answer)"
        if not isinstance(shot, (tuple, list)):
            raise invalid(op, f"shots[{row}]", contract, kind_of(shot), kind=TypeError)
        if len(shot) != 3:
            raise invalid(op, f"shots[{row}]", contract, f"{len(shot)} entries")
    return found


def live_prefix(op: str, prefix: Any, kind: type, model: Any) -> None:
    if not isinstance(prefix, kind):
        raise invalid(op, "prefix", "be made by GPTJ.prefix", kind_of(prefix), kind=TypeError)
    if not prefix.length:
        raise invalid(op, "prefix", "be in use", "one that was released", "make it anew")
    if prefix.model is not model:
        raise invalid(op, "prefix", "be of this model", "one of another", "make it with this model's prefix()")


def fits_cache(op: str, batch: int, lengths: list[int]) -> None:
    if batch != len(lengths):
        raise invalid(op, "cache", f"hold one sequence per row, {batch}", str(len(lengths)), "model.new_cache(B)")
