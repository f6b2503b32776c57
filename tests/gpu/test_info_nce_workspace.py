"""What the Triton launchers of info_nce allocate beside inputs, states' statistics and gradients, forward and backward.

Counted on tensors without memory: every storage that is alive at once, while kernels are left out.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from triton.runtime.jit import JITFunction

from limber_fast.kernels import info_nce_bwd_launch, info_nce_launch
from limber_fast.kernels.info_nce_cases import ARITHMETIC, SMS
from limber_fast.kernels.info_nce_configs import choose

WORKSPACE = 64 << 20
# Bytes a row of either tower: the state, in the forward pass an image row's positive, in the backward pass its weight.
# Then what an option adds.
EACH_ROW = {"forward": 20, "backward": 20}
OF_OPTION = {
    "plain": 0,
    "labels": 0,
    "normalize": 4,  # the norm
    "smoothing": 8 + 12,  # two more fields of the state, and three sums of the forward pass
    "stats": 12 + 1,  # three sums of the forward pass, and whether the row is right
    "ids": 0,
    "sigmoid": 0,
    "extra": 0,
}


class Peak(TorchDispatchMode):
    """The most bytes of storages that were alive at once, but for those of `apart`."""

    def __init__(self, *apart: Tensor | None) -> None:
        super().__init__()
        self.apart = {x.untyped_storage()._cdata for x in apart if x is not None}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_iter(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self.apart:
                storage = x.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: one for key, one in self.alive.items() if not one[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self.alive.values()))
        return out


def peaks(option: str, n: int, m: int, d: int, arithmetic: str, target: str, passes=tuple(EACH_ROW)) -> dict[str, int]:
    """Bytes at once of a forward pass and of the backward pass behind it, less the towers' gradients."""
    dtype, precision = ARITHMETIC[arithmetic]

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    image, text, scale = new(n, d, dtype=dtype), new(m, d, dtype=dtype), new()
    index = [new(size, dtype=torch.int32) for size in (n, m)]
    square, ids, sigmoid = n == m, option == "ids", option == "sigmoid"
    extra = new(1000, d, dtype=dtype) if option == "extra" else None
    labels = index[0] if option == "labels" or not square else None
    call = info_nce_launch.Call(
        image=image, text=text, extra=extra, scale=scale, bias=scale, labels=labels,
        image_ids=index[0] if ids else None, text_ids=index[1] if ids else None,
        label_smoothing=0.1 if option == "smoothing" else 0.0, normalize=option == "normalize", sigmoid=sigmoid,
        columns=square and not sigmoid, programs=2 * SMS[target], sms=SMS[target], precision=precision,
        config=choose((int(target[3:-1]), int(target[-1])), dtype, precision, True),
    )  # fmt: skip
    gradients = [new(size) if i == 0 or call.columns else None for i, size in enumerate((n, m))]
    with Peak(image, text, extra, scale, *index, *gradients) as peak:
        row, col, *_ = info_nce_launch.info_nce_fwd(call, option == "stats")
    if "backward" not in passes:
        return {"forward": peak.bytes}
    forward, peak.bytes = peak.bytes, 0
    with peak:
        found = info_nce_bwd_launch.info_nce_bwd(
            call, row, col, *gradients, need_image=True, need_text=True, need_extra=extra is not None
        )
    return {"forward": forward, "backward": peak.bytes - sum(x.nbytes for x in found if x is not None)}


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch):
    monkeypatch.setattr(JITFunction, "run", lambda *args, **kwargs: None)


@pytest.mark.parametrize("option", OF_OPTION)
def test_steps(option):
    """A row's share, the workspace, and one fp32 accumulator of the columns where gradients are 16-bit."""
    for target, arithmetic, (n, d) in product(SMS, ARITHMETIC, ((256, 512), (8192, 512), (32768, 1024))):
        extra = 1000 * (option == "extra")
        accumulator = 0 if ARITHMETIC[arithmetic][0] == torch.float32 else 4 * d * (n + extra)
        most = (EACH_ROW["forward"] + OF_OPTION[option]) * 2 * n + WORKSPACE + accumulator
        found = peaks(option, n, n, d, arithmetic, target)
        assert max(found.values()) <= most, (target, arithmetic, n, d, found, most)


# Rows of both towers; those of one of them are doubled. The workspace has its largest size with either, within a byte
# of each row.
SIZES = {("image", "forward"): (1 << 23, 192), ("image", "backward"): (1 << 19, 192),
         ("text", "forward"): (1024, 1 << 19), ("text", "backward"): (1024, 1 << 19)}  # fmt: skip


@pytest.mark.parametrize("tower, which", SIZES)
@pytest.mark.parametrize("option", OF_OPTION)
def test_each_row(option, tower, which):
    n, m = SIZES[tower, which]
    doubled = (2 * n, m) if tower == "image" else (n, 2 * m)
    found = [peaks(option, *rows, 8, "fp32", "sm_90", (which,))[which] for rows in ((n, m), doubled)]
    each = (found[1] - found[0]) / max(n, m)
    print(f"{option}, {which}, {tower}: {each:.2f} bytes a row")
    assert each < EACH_ROW[which] + OF_OPTION[option] + 0.75  # three numbers a block of rows among them
