"""Read the pictures and masks that prompts name."""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
from functools import lru_cache

from PIL import Image, ImageOps

from madgen.types import MaskFile, PictureFile
from madgen.utils.errors import UserError

DAMAGED = (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, struct.error, OverflowError)
"""What Pillow raises for damaged files."""


def read_file(path: str, span: tuple[int, int] | None = None) -> bytes:
    """Return the content of a file, or a part of it: offset and size. Raises OSError."""
    with open(path, "rb") as stream:
        if span is None:
            return stream.read()
        stream.seek(span[0])
        return stream.read(span[1])


def read_unchanged(file: MaskFile | PictureFile, kind: str) -> bytes:
    """Return the content of a file; UserError if it cannot be read or has changed since the job was planned."""
    try:
        content = read_file(file.path, file.span if isinstance(file, PictureFile) else None)
    except OSError as error:
        raise UserError(f"cannot read the {kind} {file.path}: {error.strerror}") from error
    if file.sha256 and hashlib.sha256(content).hexdigest() != file.sha256:
        raise UserError(
            f"the {kind} {file.path} has changed since the job was planned; restore it, or start a new dataset"
        )
    return content


def decode_picture(content: bytes, kind: str, name: str) -> Image.Image:
    """Decode a picture completely.

    Raises UserError for content that is damaged, is no picture, or has more pixels than Pillow considers safe, or more
    than 8 bits per channel. `kind` and `name` are for messages.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(content))
            _check_size(image, kind, name)
            image.load()
    except Image.DecompressionBombError:
        raise UserError(f"the {kind} {name} has more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} px; shrink it") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"cannot read the {kind} {name}: it is not a picture, or its header is damaged") from None
    except DAMAGED as error:
        raise UserError(f"cannot read the {kind} {name}: {error}") from error
    if image.mode.startswith(("I", "F")):
        raise UserError(f"the {kind} {name} has more than 8 bits per channel; save it with 8")
    return image


def _check_size(image: Image.Image, kind: str, name: str) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise UserError(
            f"the {kind} {name} of {image.height}x{image.width} px (height x width) has more than {limit} px; shrink it"
        )


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
