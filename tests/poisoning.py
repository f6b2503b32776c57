"""Uninitialised tensors that hold NaN."""

from __future__ import annotations

import pytest
import torch


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on torch's empty tensors hold NaN (integers: their largest value)."""

    def poisoned(allocate):
        def allocate_poisoned(*args, **kwargs):
            x = allocate(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x.fill_(torch.iinfo(x.dtype).max)

        return allocate_poisoned

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
