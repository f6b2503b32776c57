"""The processes of `rank_pool`: what a spawned one finds by name cannot live in a conftest, of which there are many."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from rank_pool import Ranks


@pytest.fixture(scope="session")
def ranks():
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        pool = Ranks(Path(folder))
        yield pool
        pool.close()
    os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(OMP_NUM_THREADS=before)
