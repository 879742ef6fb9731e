"""From decoded pixels to pictures."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

WHOLE_AT_MOST = 2**22
"""Pixels that `decode: auto` decodes in one pass; of the size alone, so that the bytes do not depend on the memory."""


def decodes_tiled(height: int, width: int, decode: str) -> bool:
    """Whether panoramas of this size (pixels) are decoded in tiles."""
    return decode == "tiled" or (decode == "auto" and height * width > WHOLE_AT_MOST)


def to_uint8(pixels_B3HW: Tensor) -> np.ndarray:
    """Pixels in 0..1 to uint8 [B, H, W, 3]."""
    return levels(pixels_B3HW).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def levels(pixels: Tensor) -> Tensor:
    """0..1 to whole numbers of 0..255, rounded as diffusers does."""
    return (pixels * 255).round()
