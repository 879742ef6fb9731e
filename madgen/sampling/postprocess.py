"""Convert decoded pixels to images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from madgen.utils.errors import UserError

if TYPE_CHECKING:
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


def convert(pixels_B3HW: Tensor, output: str) -> Any:
    """Convert pixels in 0..1 as diffusers does.

    `pil`: a list of images; `np`: float32 [B, H, W, 3]; `pt`: the tensor; `image`: see `to_uint8`.
    """
    if output == "pt":
        return pixels_B3HW
    if output == "np":
        return pixels_B3HW.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    images = to_uint8(pixels_B3HW)
    return images if output == "image" else [Image.fromarray(image) for image in images]


def check_output(name: str, value: Any, known: Sequence[str]) -> None:
    """Raise UserError unless `value`, the argument `name`, is one of the `known` kinds of output."""
    if not isinstance(value, str) or value not in known:
        raise UserError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
