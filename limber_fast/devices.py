"""The device that a command computes on."""

from __future__ import annotations

import torch

from limber_fast import checks


def device_of(op: str, wanted: str | None) -> torch.device:
    """'cpu' or 'cuda' as --device names it; by default this process's GPU where torch sees one.

    Raises: ValueError for 'cuda' where it sees none.
    """
    seen = torch.cuda.is_available()
    if wanted == "cuda" and not seen:
        raise checks.invalid(op, "--device", "be one that torch sees", "'cuda' without a GPU", "use --device cpu")
    if wanted == "cpu" or not seen:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
