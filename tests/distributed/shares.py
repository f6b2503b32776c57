"""A rank's share of a global batch, and tensors to differentiate by."""

from __future__ import annotations

import torch


def own_rows(sizes, rank):
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def leaves(*values):
    """The towers, scale and bias as leaves in the dtype of the first."""
    dtype = torch.float64 if values[0].dtype == torch.float64 else torch.float32
    new = [v.clone() if isinstance(v, torch.Tensor) else torch.tensor(v, dtype=dtype) for v in values]
    return [v.requires_grad_() for v in new]
