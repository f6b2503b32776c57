"""Drawings as PNG, for the page."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image
from torch import Tensor


def png(image: Tensor) -> bytes:
    """[3, H, W] uint8 as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
