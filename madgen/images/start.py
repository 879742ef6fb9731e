"""The picture that sampling starts from, enlarged and placed on the canvas, and the part of it that is kept."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
Size = tuple[int, int]
"""(height, width) in pixels."""


@dataclass(frozen=True)
class Start:
    """A picture on a canvas."""

    pixels_HWC: np.ndarray
    """uint8 [H, W, 3]; around a placed picture its border is repeated."""
    known_HW: np.ndarray | None = None
    """Pixels that are kept, bool [H, W]; None: none, all are starting points only."""


def scaled_size(size: Size, scale: float) -> Size:
    """Return a size in whole pixels after scaling."""
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def keeps(mask: Image.Image) -> np.ndarray:
    """Return which pixels a mask (8-bit gray) keeps: those nearer to white, bool [H, W]."""
    return np.asarray(mask) >= 128


def place_picture(
    image: Image.Image,
    mask: Image.Image | None,
    size: Size,
    left_top: tuple[int, int] | None = None,
    scale: float = 1.0,
    resample: str = "lanczos",
) -> Start:
    """Put an image (RGB), and its mask, on a canvas of `size`; without `left_top` it is resized to the whole canvas."""
    target = size if left_top is None else scaled_size((image.height, image.width), scale)
    pixels = np.asarray(_resized(image, target, RESAMPLING[resample]))
    known = None if mask is None else keeps(_resized(mask, target, RESAMPLING["bilinear"]))
    if left_top is None:
        return Start(pixels, known)
    (left, top), (height, width) = left_top, target
    margins = ((top, size[0] - top - height), (left, size[1] - left - width))
    inside = np.ones(target, bool) if known is None else known
    return Start(np.pad(pixels, (*margins, (0, 0)), mode="edge"), np.pad(inside, margins))


def _resized(image: Image.Image, size: Size, resample: Image.Resampling) -> Image.Image:
    return image if (image.height, image.width) == size else image.resize((size[1], size[0]), resample)


def feather(known_HW: np.ndarray, width: int, loop: bool = False) -> np.ndarray:
    """Return weights of the kept part, float32 [H, W]: 0 outside of it, rising to 1 over `width` pixels inside.

    Distances to the generated part are Euclidean; on a loop they are measured across the edge as well.
    """
    from scipy.ndimage import distance_transform_edt

    extent = known_HW.shape[1]
    around = min(width + 1, extent) if loop else 0
    padded = np.pad(known_HW, ((0, 0), (around, around)), mode="wrap") if around else known_HW
    if padded.all():
        return np.ones(known_HW.shape, np.float32)
    distance = distance_transform_edt(padded)[:, around : around + extent]
    return np.minimum(distance / (width + 1), 1).astype(np.float32)


def keep_known(image_HWC: np.ndarray, start: Start, width: int, loop: bool = False) -> np.ndarray:
    """Return a generated image, uint8 [H, W, 3], with the kept part in place, blended over `width` pixels."""
    if start.known_HW is None:
        return image_HWC
    weights = feather(start.known_HW, width, loop)[..., None]
    blended = start.pixels_HWC * weights + image_HWC * (1 - weights)
    return np.round(blended).astype(np.uint8)
