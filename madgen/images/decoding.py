"""Read the pictures and masks that prompts name."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import warnings
from functools import lru_cache

from PIL import Image, ImageOps

from madgen.images.picture_cache import MAX_BYTES, cache_folder, content_of, is_url, too_large
from madgen.types import MaskFile, PictureFile
from madgen.utils.errors import UserError

DAMAGED = (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, struct.error, OverflowError)
"""What Pillow raises for damaged files."""


def read_file(path: str, span: tuple[int, int] | None = None) -> bytes:
    """Return the content of a file, or a part of it: offset and size. Raises OSError, and UserError if it is large."""
    with open(path, "rb") as stream:
        offset, size = span or (0, os.fstat(stream.fileno()).st_size)
        if size > MAX_BYTES:
            raise too_large(path)
        stream.seek(offset)
        return stream.read(size)


def read_unchanged(file: MaskFile | PictureFile, kind: str) -> bytes:
    """Return the content of a file; UserError if it cannot be read or has changed since the job was planned."""
    if isinstance(file, PictureFile) and is_url(file.path):
        return content_of(file.path, file.sha256)
    try:
        content = read_file(file.path, file.span if isinstance(file, PictureFile) else None)
    except OSError as error:
        hint = "; run `madgen plan` on this machine to cache it" if str(cache_folder()) in file.path else ""
        raise UserError(f"cannot read the {kind} {file.path}: {error.strerror}{hint}") from error
    if file.sha256 and hashlib.sha256(content).hexdigest() != file.sha256:
        raise UserError(
            f"the {kind} {file.path} has changed since the job was planned; restore it, or start a new dataset"
        )
    return content


def decode_picture(content: bytes, kind: str, name: str) -> Image.Image:
    """Decode a picture completely.

    Raises UserError for content that is damaged, is no picture, or has more pixels than Pillow considers safe, several
    frames, or more than 8 bits per channel. `kind` and `name` are for messages.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(content))
            check_format(image, kind, name)
            image.load()
    except Image.DecompressionBombError:
        raise UserError(f"the {kind} {name} has more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} px; shrink it") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"cannot read the {kind} {name}: it is not a picture, or its header is damaged") from None
    except DAMAGED as error:
        raise UserError(f"cannot read the {kind} {name}: {error}") from error
    return image


def check_format(image: Image.Image, kind: str, name: str) -> None:
    """Raise UserError for a picture, decoded or not, of more pixels, frames or bits per channel than are read."""
    limit, frames = Image.MAX_IMAGE_PIXELS, getattr(image, "n_frames", 1)
    size = f"{image.height}x{image.width} px (height x width)"
    if min(image.size) == 0:
        raise UserError(f"the {kind} {name} of {size} has no pixels")
    if limit is not None and image.width * image.height > limit:
        raise UserError(f"the {kind} {name} of {size} has more than {limit} px; shrink it")
    if frames > 1 and image.format != "MPO":  # a photo with its depth or preview
        raise UserError(f"the {kind} {name} has {frames} frames; save the one to use as a picture")
    if image.mode.startswith(("I", "F")) or any(";16" in layout for layout in _raw_modes(image)):
        raise UserError(f"the {kind} {name} has more than 8 bits per channel; save it with 8")


def _raw_modes(image: Image.Image) -> list[str]:
    """Return how the pixels of a file that is not decoded yet are stored, such as `RGB;16B`."""
    arguments = [tile[3] for tile in getattr(image, "tile", ())]
    first = [argument[0] if isinstance(argument, tuple) and argument else argument for argument in arguments]
    return [layout for layout in first if isinstance(layout, str)]


@lru_cache(maxsize=8)  # the samples of a prompt follow each other
def read_picture(file: PictureFile, kind: str = "image") -> Image.Image:
    """Return a picture in RGB; as in diffusers, transparency is ignored. The picture is cached; do not modify it.

    Raises UserError as `read_unchanged` and `decode_picture`.
    """
    return upright(decode_picture(read_unchanged(file, kind), kind, file.path)).convert("RGB")


@lru_cache(maxsize=8)
def read_mask(file: PictureFile) -> Image.Image:
    """Return a mask in 8-bit gray, see `as_mask`. The picture is cached; do not modify it."""
    return as_mask(upright(decode_picture(read_unchanged(file, "mask"), "mask", file.path)))


def upright(image: Image.Image) -> Image.Image:
    """Turn a photo upright, as its EXIF data says."""
    try:
        return ImageOps.exif_transpose(image)
    except DAMAGED:  # damaged EXIF data
        return image


def as_mask(image: Image.Image) -> Image.Image:
    """Convert a picture to 8-bit gray; transparent pixels become black."""
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, "black")
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    return image.convert("L")
