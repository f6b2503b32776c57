"""What info_nce and the losses over it ask of their arguments."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from limber_fast.checks.general import FLOATS, invalid, kind_of, real, same_device, same_dtype, shape_of


def same_features(op: str, name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """`x` has the width, dtype and device of `like`."""
    if x.shape[1] != like.shape[1]:
        remedy = "project both to one width"
        raise invalid(op, name, f"have the D = {like.shape[1]} of {like_name}", shape_of(x), remedy)
    same_dtype(op, name, x, like_name, like)
    same_device(op, name, x, like_name, like)


def constant_weights(op: str, weights: Tensor) -> None:
    if not weights.is_floating_point():
        remedy = "convert it: weights.float()"
        raise invalid(op, "weights", "be floating point", kind_of(weights), remedy, kind=TypeError)
    if weights.requires_grad:
        raise invalid(op, "weights", "be constants", "a tensor that requires grad", "detach it: weights.detach()")


def label_smoothing(op: str, value: float, variant: str) -> None:
    real(op, "label_smoothing", value)
    if not 0 <= value < 1:
        raise invalid(op, "label_smoothing", "lie in [0, 1)", repr(value), "0 turns it off")
    if value and variant == "sigmoid":
        raise invalid(op, "label_smoothing", "be 0 with variant='sigmoid', which has no softmax to smooth", repr(value))


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
        found = f"{len(ids)} of them" if isinstance(ids, (tuple, list)) else kind_of(ids)
        raise invalid(op, "ids", "be a tensor [N] or a pair (image_ids [N], text_ids [M])", found, kind=TypeError)


def shared_ids(op: str, n: int, m: int) -> None:
    if n != m:
        remedy = "pass a pair (image_ids [N], text_ids [M])"
        raise invalid(op, "ids", "be a pair where N and M differ", f"one tensor with N = {n}, M = {m}", remedy)


# What the ranks of a group tell each other before they exchange anything else; all but the rows must be alike.
GROUP_FACTS = ("rows", "D", "dtype", "variant", "label_smoothing", "normalize", "reduction", "ids", "weights")
_IN_WORDS = {
    "dtype": lambda code: str(FLOATS[int(code)]),
    "variant": lambda code: ("'softmax'", "'sigmoid'")[int(code)],
    "label_smoothing": lambda value: f"{value:g}",
    "normalize": lambda code: str(bool(code)),
    "reduction": lambda code: ("'mean'", "'sum'")[int(code)],
    "ids": lambda code: ("none", "some")[int(code)],
    "weights": lambda code: ("none", "some")[int(code)],
}


def right_on_every_rank(op: str, wrong: list[int]) -> None:
    if wrong:
        found = f"an error on group rank {', '.join(map(str, wrong))}"
        raise invalid(op, "the arguments", "be right on every rank of the group", found, "that rank says which")


def alike_on_every_rank(op: str, ranks: list[dict[str, float]]) -> None:
    for name in GROUP_FACTS[1:]:
        values = [facts[name] for facts in ranks]
        if len(set(values)) > 1:
            words = _IN_WORDS.get(name, lambda value: str(int(value)))
            found = ", ".join(f"{words(value)} on group rank {rank}" for rank, value in enumerate(values))
            kind = TypeError if name == "dtype" else ValueError
            raise invalid(op, name, "be the same on every rank of the group", found, kind=kind)


def over_group(op: str, group: Any) -> None:
    """`group` is a process group that this process belongs to."""
    if not dist.is_available() or not dist.is_initialized():
        found = "no process group of this process"
        raise invalid(op, "torch.distributed", "be initialised for group=", found, "call init_process_group")
    if group is dist.GroupMember.NON_GROUP_MEMBER or group is None or dist.get_rank(group) < 0:
        raise invalid(op, "group", "be one that this process belongs to", "a group of other processes",
                      "call the loss on its members alone")  # fmt: skip


def not_over_group(op: str, given: dict[str, bool]) -> None:
    """What only one process can do."""
    for words, is_given in given.items():
        if is_given:
            raise invalid(op, words, "not be combined with group=", "both", "use one process for it")


def loss_group(op: str, world_size: int, rank: int, use_horovod: bool, group: Any) -> Any:
    """The process group that open_clip's constructor arguments and `group` mean; None for one process."""
    if use_horovod:
        raise invalid(op, "use_horovod", "be False", repr(use_horovod), "use torch.distributed: group= or world_size=")
    if group is None and world_size == 1:
        if rank != 0:
            raise invalid(op, "rank", "be 0 where world_size is 1", repr(rank), "pass world_size too, or group=")
        return None
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    over_group(op, group)
    found = {"world_size": dist.get_world_size(group), "rank": dist.get_rank(group)}
    given = {"world_size": world_size, "rank": rank}
    if (world_size, rank) != (1, 0) and found != given:  # the defaults beside group= say nothing
        raise invalid(op, "world_size and rank", f"be those of the group, {found}", str(given), "leave them out")
    return group
