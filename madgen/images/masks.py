"""Convert masks of regions to weights of latent cells."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from functools import lru_cache

import numpy as np
from PIL import Image

from madgen.images.decoding import as_mask, decode_picture, read_unchanged
from madgen.types import Box, Mask, MaskFile, MaskPicture, Ramp, Region
from madgen.utils.errors import UserError

MAX_STRETCH = 0.02  # relative difference of aspect ratios between mask and panorama, for rounded sizes


@lru_cache(maxsize=256)
def cell_weights(mask: Mask, height: int, width: int, factor: int, loop: bool = False) -> np.ndarray:
    """Return the share of each latent cell that a mask covers, float32 [height / factor, width / factor] in 0..1.

    `height`, `width`: pixels of the panorama; `factor`: pixels per cell. Raises UserError for a mask that does not
    match the panorama. The array is cached; do not modify it.
    """
    if isinstance(mask, Ramp):
        return _ramp(mask, height // factor, width // factor, loop)
    if isinstance(mask, Box):
        down = _overlaps(mask.top, mask.bottom, height, factor)
        weights = np.outer(down, _overlaps(mask.left, mask.right, width, factor))
    else:
        weights = _picture(mask, height, width, factor)
    if not weights.any():
        raise UserError(
            f"the region's mask {_name(mask)} covers no part of {height}x{width} px; draw the region in white"
        )
    return weights


def embed_mask(region: Region) -> Region:
    """Return the region with the content of its mask file, which may change or disappear, in place of the path."""
    return replace(region, mask=MaskPicture(_png(region.mask))) if isinstance(region.mask, MaskFile) else region


@lru_cache(maxsize=256)
def _png(mask: MaskFile) -> str:
    stream = io.BytesIO()
    _open(mask).save(stream, format="PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode()


def _overlaps(first: int, last: int, extent: int, factor: int) -> np.ndarray:
    """Return the share of each cell of an axis between `first` and `last` (pixels)."""
    if not 0 <= first < last <= extent:
        raise UserError(
            f"a region's box [left, top, right, bottom] must be inside the panorama: "
            f"need 0 <= {first} < {last} <= {extent} px"
        )
    edges = np.arange(0, extent + 1, factor)
    inside = np.minimum(edges[1:], last) - np.maximum(edges[:-1], first)
    return (inside.clip(0) / factor).astype(np.float32)


def _ramp(ramp: Ramp, rows: int, columns: int, loop: bool) -> np.ndarray:
    """Return 1 at the prompt's position, falling to 0 at its neighbours', on a loop across the edge."""
    centres = (np.arange(columns) + 0.5) / columns
    if loop:
        distance = np.abs(centres - ramp.index / ramp.count)
        distance = np.minimum(distance, 1 - distance) * ramp.count
    else:
        distance = np.abs(centres * (ramp.count - 1) - ramp.index)
    return np.tile((1 - distance).clip(0).astype(np.float32), (rows, 1))


def _picture(mask: MaskFile | MaskPicture, height: int, width: int, factor: int) -> np.ndarray:
    image = _open(mask)
    if abs(image.width * height / (image.height * width) - 1) > MAX_STRETCH:
        raise UserError(
            f"the mask {_name(mask)} of {image.height}x{image.width} px (height x width) has another aspect ratio "
            f"than the panorama of {height}x{width} px; draw it in that size, or in a multiple of it"
        )
    cells = image.resize((width // factor, height // factor), Image.Resampling.BOX)
    return np.asarray(cells, dtype=np.float32) / 255


def _open(mask: MaskFile | MaskPicture) -> Image.Image:
    """Load a mask as 8-bit gray. Raises UserError if it cannot be read, or the file has changed since planning."""
    content = base64.b64decode(mask.png) if isinstance(mask, MaskPicture) else read_unchanged(mask, "mask")
    return as_mask(decode_picture(content, "mask", _name(mask)))


def _name(mask: Mask) -> str:
    return mask.path if isinstance(mask, MaskFile) else "(embedded)" if isinstance(mask, MaskPicture) else str(mask)
