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


n, d, dtype = int(sys.argv[1]), int(sys.argv[2]), getattr(torch, sys.argv[3])
torch.set_num_threads(2)
small = torch.ones(64, 64, dtype=dtype, requires_grad=True)
info_nce(small, small, 1.0, cache_mb=0).backward()
image, text = (torch.full((n, d), d**-0.5, dtype=dtype, requires_grad=True) for _ in range(2))
Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
before = status("VmRSS")
info_nce(image, text, 10.0, cache_mb=0).backward()
print(status("VmHWM") - before - image.nbytes - text.nbytes)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux")
@pytest.mark.parametrize(("n", "d", "dtype"), [(1024, 65536, "bfloat16"), (1024, 16384, "float32")])
def test_memory_beside_towers_and_gradients(n, d, dtype):
    done = subprocess.run(
        [sys.executable, "-c", _STEP, str(n), str(d), dtype], capture_output=True, text=True, timeout=600, check=True
    )
    assert 0 < int(done.stdout) <= (256 << 20) + 2 * 20 * n
