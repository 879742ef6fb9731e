"""Where regions lie: masks of the user to weights on the latent cells."""

from __future__ import annotations

import base64
import hashlib
import io
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from madgen.types import Box, Mask, MaskFile, MaskPicture, Ramp, Region
from madgen.utils.errors import UserError

MOST_STRETCH = 0.02  # by which a mask's aspect ratio may differ from the panorama's: roundings, not another picture


@lru_cache(maxsize=256)
def cell_weights(mask: Mask, height: int, width: int, factor: int, loop: bool = False) -> np.ndarray:
    """Weights in 0..1, float32 [height / factor, width / factor]: how much of each latent cell a mask covers.

    `height`, `width`: the panorama's pixels; `factor`: pixels a cell. UserError for a mask that does not fit it. The
    array is kept for the next panorama: do not write to it.
    """
    if isinstance(mask, Ramp):
        return _ramp(mask, height // factor, width // factor, loop)
    if isinstance(mask, Box):
        down = _overlaps(mask.top, mask.bottom, height, factor)
        weights = np.outer(down, _overlaps(mask.left, mask.right, width, factor))
    else:
        weights = _picture(mask, height, width, factor)
    if not weights.any():
        raise UserError(f"the region's mask {_name(mask)} covers nothing of {height}x{width} px; draw it in white")
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
    """Share of each cell of an axis that lies in `first` .. `last` (pixels)."""
    if not 0 <= first < last <= extent:
        raise UserError(
            f"a region's box [left, top, right, bottom] must lie inside the panorama: "
            f"need 0 <= {first} < {last} <= {extent} px"
        )
    edges = np.arange(0, extent + 1, factor)
    inside = np.minimum(edges[1:], last) - np.maximum(edges[:-1], first)
    return (inside.clip(0) / factor).astype(np.float32)


def _ramp(ramp: Ramp, rows: int, columns: int, loop: bool) -> np.ndarray:
    """1 at the prompt's place, falling to 0 at its neighbours' places; on a loop the last is the first's neighbour."""
    centres = (np.arange(columns) + 0.5) / columns
    if loop:
        distance = np.abs(centres - ramp.index / ramp.count)
        distance = np.minimum(distance, 1 - distance) * ramp.count
    else:
        distance = np.abs(centres * (ramp.count - 1) - ramp.index)
    return np.tile((1 - distance).clip(0).astype(np.float32), (rows, 1))


def _picture(mask: MaskFile | MaskPicture, height: int, width: int, factor: int) -> np.ndarray:
    image = _open(mask)
    if abs(image.width * height / (image.height * width) - 1) > MOST_STRETCH:
        raise UserError(
            f"the mask {_name(mask)} of {image.height}x{image.width} px (height x width) has another shape than the "
            f"panorama of {height}x{width} px; draw it for that size, or for a multiple of it"
        )
    cells = image.resize((width // factor, height // factor), Image.Resampling.BOX)
    return np.asarray(cells, dtype=np.float32) / 255


def _open(mask: MaskFile | MaskPicture) -> Image.Image:
    """8-bit greys; what is transparent is black."""
    try:
        with Image.open(io.BytesIO(_content(mask))) as image:
            if image.mode.startswith(("I", "F")):
                raise UserError(f"the mask {_name(mask)} has more than 8 bits a pixel; save it with 8")
            if image.has_transparency_data:
                ground = Image.new("RGBA", image.size, "black")
                return Image.alpha_composite(ground, image.convert("RGBA")).convert("L")
            return image.convert("L")
    except (OSError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the mask {_name(mask)}: {error}") from error


def _content(mask: MaskFile | MaskPicture) -> bytes:
    """The mask's bytes; UserError if the file is not the one that was planned with."""
    if isinstance(mask, MaskPicture):
        return base64.b64decode(mask.png)
    content = Path(mask.path).read_bytes()
    if mask.sha256 and hashlib.sha256(content).hexdigest() != mask.sha256:
        raise UserError(f"the mask {mask.path} has changed since the job was planned; restore it, or start anew")
    return content


def _name(mask: Mask) -> str:
    return (
        mask.path if isinstance(mask, MaskFile) else "that is recorded" if isinstance(mask, MaskPicture) else str(mask)
    )
