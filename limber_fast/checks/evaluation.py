"""What metrics ask of captions, references, answers and scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limber_fast.checks.general import invalid, real, shape_of


def texts(op: str, name: str, x: Any) -> None:
    """A sequence of at least one string."""
    _sequence(op, name, x, "strings, one per image")
    for row, text in enumerate(x):
        _text(op, f"{name}[{row}]", text)


def text_sets(op: str, name: str, x: Any, like_name: str, like: Sequence) -> None:
    """As many sequences of at least one string as `like` has rows."""
    _sequence(op, name, x, f"lists of strings, one list per row of {like_name}")
    if len(x) != len(like):
        raise invalid(op, name, f"have one list per row of {like_name}, {len(like)}", str(len(x)))
    for row, texts_of_row in enumerate(x):
        _sequence(op, f"{name}[{row}]", texts_of_row, "strings")
        for column, text in enumerate(texts_of_row):
            _text(op, f"{name}[{row}][{column}]", text)


def as_long(op: str, name: str, x: Sequence, like_name: str, like: Sequence) -> None:
    if len(x) != len(like):
        raise invalid(op, name, f"be as long as {like_name}, {len(like)}", str(len(x)))


def finite_scores(op: str, name: str, x: np.ndarray) -> None:
    """[N] or more, at least one row, real numbers only: whatever ranks or averages NaN flatters somebody."""
    if x.ndim == 0 or 0 in x.shape:
        raise invalid(op, name, "hold at least one score", f"shape {x.shape}")
    bad = np.argwhere(~np.isfinite(x))
    if len(bad):
        where = ", ".join(map(str, bad[0]))
        raise invalid(op, name, "be finite", f"{x[tuple(bad[0])]} at [{where}], {len(bad)} such in all")


def _sequence(op: str, name: str, x: Any, contract: str) -> None:
    if isinstance(x, (str, bytes)) or not isinstance(x, Sequence):
        raise invalid(op, name, f"be a list of {contract}", type(x).__name__, kind=TypeError)
    if not x:
        raise invalid(op, name, "not be empty", "no entry")


def _text(op: str, name: str, x: Any) -> None:
    if not isinstance(x, str):
        raise invalid(op, name, "be a string", type(x).__name__, kind=TypeError)


def at_least_two(op: str, name: str, x: Sequence[Sequence], remedy: str) -> None:
    for row, entries in enumerate(x):
        if len(entries) < 2:
            raise invalid(op, f"{name}[{row}]", "have at least two entries", str(len(entries)), remedy)


def two_or_more(op: str, name: str, count: int) -> None:
    if count < 2:
        raise invalid(op, name, "be at least 2", str(count))


def one_score_per_row(op: str, name: str, x: np.ndarray) -> None:
    if x.ndim != 1:
        raise invalid(op, name, "be [N]", f"shape {x.shape}")


def scores_in_columns(op: str, name: str, x: np.ndarray) -> None:
    if x.ndim != 2:
        raise invalid(op, name, "be [N, C]", f"shape {x.shape}")


def open_share(op: str, name: str, x: Any) -> None:
    real(op, name, x)
    if not 0 < x < 1:
        raise invalid(op, name, "lie between 0 and 1", repr(x))


def features_of_width(op: str, name: str, x: Tensor, width: int) -> None:
    if x.shape[1] != width:
        raise invalid(op, name, f"have D = {width} features, as the others", shape_of(x))


def directions(op: str, name: str, x: Tensor) -> None:
    """Finite rows, none of zeros: others have no cosine."""
    if not (good := torch.isfinite(x).all(1) & (x != 0).any(1)).all():
        row = int((~good).nonzero()[0])
        found = "zeros" if bool((x[row] == 0).all()) else "NaN or infinity"
        raise invalid(op, name, "be finite, and no row all zeros", f"{found} in row {row}")


def every_row(op: str, name: str, owners: Tensor, rows: int) -> None:
    """Indices within [0, rows), each at least once."""
    if owners.ndim != 1 or int(owners.min()) < 0 or int(owners.max()) >= rows:
        raise invalid(op, name, f"lie within [0, {rows})", f"from {int(owners.min())} to {int(owners.max())}")
    missing = (owners.bincount(minlength=rows) == 0).nonzero()
    if len(missing):
        raise invalid(op, name, "name every image at least once", f"none for image {int(missing[0])}")
