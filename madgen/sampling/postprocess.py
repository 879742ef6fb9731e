"""Convert decoded pixels to images."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

MAX_UNTILED_PIXELS = 2**22
"""Limit of `decode: auto`. It depends on the size alone, not on the memory, so that the bytes do not either."""


def decodes_tiled(height: int, width: int, decode: str) -> bool:
    """Return whether panoramas of this size (pixels) are decoded in tiles."""
    return decode == "tiled" or (decode == "auto" and height * width > MAX_UNTILED_PIXELS)


def to_uint8(pixels_B3HW: Tensor) -> np.ndarray:
    """Convert pixels in 0..1 to uint8 [B, H, W, 3]."""
    return levels(pixels_B3HW).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def levels(pixels: Tensor) -> Tensor:
    """Round 0..1 to integers in 0..255, like diffusers."""
    return (pixels * 255).round()
