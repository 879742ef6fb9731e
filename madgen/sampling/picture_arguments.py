"""Pictures that are passed as arguments: PIL images, NumPy arrays, or paths of files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageChops

from madgen.config.schema import InitConfig
from madgen.images.decoding import DAMAGED, as_mask, check_format, decode_picture, read_file, upright
from madgen.images.placement import PlacedPicture, check_aspect, check_mask, locate, place_picture, scaled_size
from madgen.utils.console import plural
from madgen.utils.errors import UserError
from madgen.utils.validation import expand_user, listed


def parse_pictures(
    images: Sequence[Any] | None,
    masks: Sequence[Any] | None,
    size: tuple[Any, Any],
    init: InitConfig,
    name: str = "images",
) -> list[PlacedPicture]:
    """Place the `images` of panoramas of `size` (height, width; None: that of the images), with their `masks`.

    `name` is for messages. Raises UserError.
    """
    if images is None:
        if masks is not None:
            raise UserError("masks need images, whose white parts they keep; pass images")
        return []
    pictures = [parse_image(name, image) for image in images]
    kept = [None] * len(pictures) if masks is None else [parse_mask("masks", mask) for mask in masks]
    placements = [_placed(image, mask, size, init) for image, mask in zip(pictures, kept, strict=True)]
    if len(sizes := {picture.size for picture in placements}) > 1:
        listing = " and ".join(f"{height}x{width}" for height, width in sorted(sizes)[:2])
        raise UserError(f"{name} must be of one size (height x width), got {listing} px; pass height and width")
    return placements


def one_each(name: str, values: Any, count: int) -> list[Any]:
    """Return the list `values` of `count` pictures. Raises UserError for another number."""
    items = list(values) if isinstance(values, np.ndarray) and values.ndim == 4 else listed(name, values)
    if len(items) != count:
        raise UserError(
            f"{name} must be a list of one picture for each of {plural(count, 'panorama')}, got {len(items)}"
        )
    return items


def repeated(name: str, values: Any, count: int) -> list[Any]:
    """Return `values` as `one_each`; a single picture, or a list of one, is that of all panoramas, as in diffusers."""
    several = isinstance(values, list | tuple) or (isinstance(values, np.ndarray) and values.ndim == 4)
    items = list(values) if several else [values]
    return items * count if len(items) == 1 else one_each(name, items, count)


def parse_images(
    name: str, images: Any, count: int, each: Callable[[str, Any, int], list[Any]] = one_each
) -> list[Image.Image] | None:
    """Convert the argument `name`, pictures for `count` panoramas, to RGB; `each`: `one_each` or `repeated`."""
    return None if images is None else [parse_image(name, image) for image in each(name, images, count)]


def parse_image(name: str, image: Any) -> Image.Image:
    """Convert a PIL image, a uint8 array [H, W, 3] or the path of a file to RGB."""
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (3,) and image.size:
        return Image.fromarray(image)
    if isinstance(image, Image.Image | str | PathLike):
        return _loaded(name, image).convert("RGB")
    raise UserError(
        f"{name} must be PIL images, uint8 arrays [H, W, 3] or paths of files, got an item {_described(image)}"
    )


def parse_mask(name: str, mask: Any) -> Image.Image:
    """Convert a PIL image, a uint8 or bool array [H, W] or the path of a file to 8-bit gray."""
    if isinstance(mask, np.ndarray) and mask.dtype in (np.uint8, np.bool_) and mask.ndim == 2 and mask.size:
        return Image.fromarray(mask if mask.dtype == np.uint8 else mask.astype(np.uint8) * 255)
    if isinstance(mask, Image.Image | str | PathLike):
        return as_mask(_loaded(name, mask))
    raise UserError(
        f"{name} must be PIL images, uint8 or bool arrays [H, W], or paths of files, got an item {_described(mask)}"
    )


def kept_by(mask_image: Any) -> Image.Image:
    """Return the mask of what is kept, white, from diffusers' `mask_image`, white where the image is redrawn."""
    redrawn = parse_mask("mask_image", mask_image)
    return ImageChops.invert(redrawn.point(lambda level: 255 * (level >= 128)))


def _loaded(name: str, picture: Image.Image | str | PathLike[str]) -> Image.Image:
    """Decode a picture completely, and turn it upright."""
    if not isinstance(picture, Image.Image):
        path = expand_user(picture, name)
        try:
            return upright(decode_picture(read_file(str(path)), "picture", f"{path} ({name})"))
        except OSError as error:
            raise UserError(f"{name}: cannot read {path}: {error.strerror}") from error
    check_format(picture, "picture", f"in {name}")
    try:
        picture.load()
    except DAMAGED as error:
        raise UserError(f"{name}: cannot read a picture: {error}") from error
    return upright(picture)


def _described(value: Any) -> str:
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return f"{value.dtype} {list(value.shape)}"
    return f"{value!r:.80}"


def _placed(image: Image.Image, mask: Image.Image | None, size: tuple[Any, Any], init: InitConfig) -> PlacedPicture:
    if mask is not None:
        check_mask(mask, (image.height, image.width))
    own = scaled_size((image.height, image.width), init.scale)
    canvas = (own[0] if size[0] is None else size[0], own[1] if size[1] is None else size[1])
    if init.place is None:
        check_aspect(own, canvas)
        return place_picture(image, mask, canvas, resample=init.resample)
    return place_picture(image, mask, canvas, locate(init.place, own, canvas), init.scale, init.resample)
