"""The picture that sampling starts from, enlarged and placed on the canvas, and the part of it that is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from madgen.images.masks import MAX_STRETCH
from madgen.utils.errors import UserError

Size = tuple[int, int]
"""(height, width) in pixels."""


@dataclass(frozen=True)
class PlacedPicture:
    """A picture on a canvas."""

    pixels_HWC: np.ndarray
    """uint8 [H, W, 3]; around a placed picture its border is repeated."""
    known_HW: np.ndarray | None = None
    """Pixels that are kept, bool [H, W]; None: none, all are starting points only."""

    @property
    def size(self) -> Size:
        """Return the size of the canvas."""
        height, width, _ = self.pixels_HWC.shape
        return height, width


def check_aspect(picture: Size, canvas: Size) -> None:
    """Raise UserError for a picture of another aspect ratio than its canvas; rounded sizes may differ a little."""
    if abs(canvas[1] * picture[0] / (canvas[0] * picture[1]) - 1) > MAX_STRETCH:
        raise UserError(
            f"the image of {picture[0]}x{picture[1]} px (height x width) has another aspect ratio than the panorama of "
            f"{canvas[0]}x{canvas[1]} px; crop it, or set its place on the panorama (sampling.init.place)"
        )


def locate(place: Any, picture: Size, canvas: Size) -> tuple[int, int]:
    """Return the left and top pixel of a picture at a place, `center` or [left, top]. Raises UserError if outside."""
    center = (canvas[1] - picture[1]) // 2, (canvas[0] - picture[0]) // 2
    left, top = center if place == "center" else place
    if min(left, top) < 0 or left + picture[1] > canvas[1] or top + picture[0] > canvas[0]:
        raise UserError(
            f"the image of {picture[0]}x{picture[1]} px (height x width) at place [{left}, {top}] is not inside the "
            f"panorama of {canvas[0]}x{canvas[1]} px; move it, or lower sampling.init.scale"
        )
    return left, top


def check_mask(mask: Image.Image, picture: Size) -> None:
    """Raise UserError for a mask of another size than its picture, or one that keeps everything or nothing."""
    if (mask.height, mask.width) != picture:
        raise UserError(
            f"the mask of {mask.height}x{mask.width} px (height x width) must have the size of its image, "
            f"{picture[0]}x{picture[1]} px"
        )
    kept = keeps(mask)
    if kept.all() or not kept.any():
        extent = "keeps everything; draw what is generated in black" if kept.all() else "keeps nothing; leave it out"
        raise UserError(f"the mask {extent}")


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
) -> PlacedPicture:
    """Put an image (RGB), and its mask, on a canvas of `size`; without `left_top` it is resized to the whole canvas."""
    target = size if left_top is None else scaled_size((image.height, image.width), scale)
    pixels = np.asarray(_resized(image, target, Image.Resampling[resample.upper()]))
    known = None if mask is None else keeps(_resized(mask, target, Image.Resampling.BILINEAR))
    if left_top is None:
        return PlacedPicture(pixels, known)
    (left, top), (height, width) = left_top, target
    margins = ((top, size[0] - top - height), (left, size[1] - left - width))
    inside = np.ones(target, bool) if known is None else known
    return PlacedPicture(np.pad(pixels, (*margins, (0, 0)), mode="edge"), np.pad(inside, margins))


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
