"""With the cache off a step stays within 256 MiB + 20 bytes a row of either tower beside towers and gradients."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# Rows so wide that blocks of the usual size would take twice the budget. Prints what a step adds to its process's peak.
_STEP = """
import sys
from pathlib import Path

import torch

from limber_fast import info_nce


def status(key):
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


n, m, d = map(int, sys.argv[1:4])
dtype = getattr(torch, sys.argv[4])
torch.set_num_threads(2)
small = torch.ones(64, 64, dtype=dtype, requires_grad=True)
info_nce(small, small, 1.0, cache_mb=0).backward()
image, text = (torch.full((k, d), d**-0.5, dtype=dtype, requires_grad=True) for k in (n, m))
labels = None if n == m else torch.arange(n, dtype=torch.int32) % m
Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
before = status("VmRSS")
info_nce(image, text, 10.0, cache_mb=0, labels=labels, symmetric=n == m).backward()
print(status("VmHWM") - before - image.nbytes - text.nbytes)
"""


needs_linux = pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux")


def _beside_towers_and_gradients(n: int, m: int, d: int, dtype: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", _STEP, *map(str, (n, m, d)), dtype], capture_output=True, text=True, timeout=600,
        check=True,
    )  # fmt: skip
    return int(done.stdout)


@needs_linux
@pytest.mark.parametrize(("n", "d", "dtype"), [(1024, 65536, "bfloat16"), (1024, 16384, "float32")])
def test_of_wide_towers(n, d, dtype):
    assert 0 < _beside_towers_and_gradients(n, n, d, dtype) <= (256 << 20) + 2 * 20 * n


@needs_linux
def test_of_each_row():
    rows = 1 << 20, 5 << 20
    small, large = (_beside_towers_and_gradients(n, 64, 4, "float32") for n in rows)
    # 20, the gradient of its own loss included, and its label in 32 bits; half a byte for what pages round.
    assert large - small <= (20 + 4 + 0.5) * (rows[1] - rows[0])
