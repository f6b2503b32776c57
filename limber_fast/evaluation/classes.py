"""Classification scored image by image beside its controls, in the form that evaluation's pages are made of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from limber_fast.data.classes import LabelledImage
from limber_fast.evaluation.controls import derangement
from limber_fast.evaluation.predictions import MODEL, Scored, groups_of
from limber_fast.evaluation.ranking import ranks


def score_classes(
    records: Sequence[LabelledImage], names: Sequence[str], rows: dict[str, Tensor], counts: Tensor, *, seed: int = 0
) -> Scored:
    """Top-1 and top-5 of every row; a tie counts against it.

    Two rows of controls are added: `shuffled`, the model's scores given to other images, and `majority`, the most
    frequent classes whatever the image is.

    Args:
        rows: [N, C] scores, higher is better, by row; `MODEL` among them.
        counts: [C] of the images that `majority` knows.
    """
    labels = torch.tensor([record.label for record in records])
    rows = dict(rows)
    if len(records) > 1:
        rows["shuffled"] = rows[MODEL][torch.from_numpy(derangement(len(records), seed))]
    order = counts.argsort(descending=True, stable=True)
    rows["majority"] = -order.argsort().float().expand(len(records), -1)  # no ties, which would count against it
    texts, scores = {}, {}
    for row, found in rows.items():
        texts[row] = [names[i] for i in found.argmax(1).tolist()]
        rank = ranks(found, labels).numpy()
        scores[row] = {f"top-{k}": (rank < k).astype(np.float64) for k in (1, 5)}
    ids = [record.image_id for record in records]
    return Scored(ids, list(range(len(ids))), texts, scores, groups_of([record.group for record in records]))
