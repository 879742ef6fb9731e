"""Encode the pictures that a batch starts from, and keep their known parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from madgen.backbones import Backbone
from madgen.backbones._vae import encode_canvas
from madgen.config.schema import InitConfig, SamplingParams
from madgen.diffusion.start import FromPictures, Start
from madgen.images.pictures import as_mask, read_mask, read_picture
from madgen.images.placement import (
    PlacedPicture,
    check_aspect,
    check_mask,
    feather,
    locate,
    place_picture,
    scaled_size,
)
from madgen.sampling.geometry import Geometry
from madgen.sampling.postprocess import decodes_tiled
from madgen.types import Prompt
from madgen.utils.errors import UserError
from madgen.utils.validation import listed

if TYPE_CHECKING:
    from torch import Tensor

    from madgen.sampling.inputs import PanoramaBatch

Size = tuple[int, int]
"""(height, width) in pixels."""


def placed(prompt: Prompt, init: InitConfig) -> PlacedPicture | None:
    """Return the picture that a prompt starts from, on its canvas; None if it starts from noise."""
    image, mask = prompt.pictures.get("image"), prompt.pictures.get("mask")
    if image is None:
        return None
    known = None if mask is None else read_mask(mask)
    size = prompt.height, prompt.width
    return place_picture(read_picture(image), known, size, prompt.place, init.scale, init.resample)


def check_pictures(batch: PanoramaBatch, init: InitConfig) -> None:
    """Raise UserError if a batch has pictures and no strength, or the other way."""
    if batch.pictures and init.strength is None:
        raise UserError("images need a strength in 0..1, the share of the steps that redraw them; 1 starts from noise")
    if init.strength is not None and not batch.pictures:
        raise UserError(f"strength={init.strength:g} (sampling.init.strength) needs images to start from")


def start_of(
    pictures: Sequence[PlacedPicture],
    backbone: Backbone,
    geometry: Geometry,
    scheduler: Any,
    params: SamplingParams,
    steps: int,
) -> Start | None:
    """Encode the pictures of a batch; None: it starts from noise. `steps`: denoising steps that run."""
    known = _known_cells(pictures, backbone.spec.factor, backbone.device)
    if not pictures or (params.init.strength == 1 and known is None):
        return None  # as without pictures
    height, width = pictures[0].pixels_HWC.shape[:2]
    wrap = geometry.view_size if params.loop else 0
    tile = 2 * backbone.spec.view_size if decodes_tiled(height, width, params.decode) else None
    clean = [encode_canvas(backbone, _pixels(picture, backbone.device), wrap, tile) for picture in pictures]
    total = params.num_inference_steps
    return FromPictures(
        torch.cat(clean),
        total - steps,
        total,
        known,
        params.init.strength == 1,
    )


def _pixels(picture: PlacedPicture, device: torch.device) -> Tensor:
    """Return a picture as float32 [1, 3, H, W] in 0..1."""
    return torch.from_numpy(np.array(picture.pixels_HWC)).to(device).permute(2, 0, 1)[None].float() / 255


def _known_cells(pictures: Sequence[PlacedPicture], factor: int, device: torch.device) -> Tensor | None:
    """Return the latent cells all of whose pixels are kept, bool [B, 1, H, W]; None: nothing is kept."""
    if all(picture.known_HW is None for picture in pictures):
        return None
    cells = []
    for picture in pictures:
        height, width = (extent // factor for extent in picture.pixels_HWC.shape[:2])
        known = np.zeros((height * factor, width * factor), bool) if picture.known_HW is None else picture.known_HW
        cells.append(known.reshape(height, factor, width, factor).all((1, 3)))
    return torch.from_numpy(np.stack(cells)[:, None]).to(device)


def keep_known(pixels_B3HW: Tensor, pictures: Sequence[PlacedPicture], width: int, loop: bool) -> Tensor:
    """Return generated pixels in 0..1 with the kept parts of the pictures in place, blended over `width` pixels."""
    result = []
    for pixels_13HW, picture in zip(pixels_B3HW.split(1), pictures, strict=True):
        if picture.known_HW is not None:
            weight = torch.from_numpy(feather(picture.known_HW, width, loop)).to(pixels_13HW.device)
            pixels_13HW = torch.lerp(pixels_13HW, _pixels(picture, pixels_13HW.device), weight)
        result.append(pixels_13HW)
    return torch.cat(result)


def parse_pictures(images: Any, masks: Any, count: int, size: tuple[Any, Any], init: InitConfig) -> list[PlacedPicture]:
    """Convert the arguments `images` and `masks` of `count` prompts; `size` of the canvas: None is the images' own.

    Raises UserError.
    """
    if images is None:
        if masks is not None:
            raise UserError("masks need images, whose white parts they keep; pass images")
        return []
    pictures = parse_images("images", images, count)
    kept = [None] * count if masks is None else [_mask(mask) for mask in _one_each("masks", masks, count)]
    placements = [_placed(image, mask, size, init) for image, mask in zip(pictures, kept, strict=True)]
    if len(sizes := {picture.size for picture in placements}) > 1:
        listing = " and ".join(f"{height}x{width}" for height, width in sorted(sizes)[:2])
        raise UserError(f"images must be of one size (height x width), got {listing} px; pass height and width")
    return placements


def parse_images(name: str, images: Any, count: int) -> list[Image.Image]:
    """Convert the argument `name`, one PIL image or uint8 array [H, W, 3] for each of `count` panoramas, to RGB."""
    return [_image(name, image) for image in _one_each(name, images, count)]


def _one_each(name: str, values: Any, count: int) -> list[Any]:
    items = list(values) if isinstance(values, np.ndarray) and values.ndim == 4 else listed(name, values)
    if len(items) != count:
        raise UserError(f"{name} must be a list of one picture for each of {count} panoramas, got {len(items)}")
    return items


def _image(name: str, image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return Image.fromarray(image)
    raise UserError(f"{name} must be PIL images or uint8 arrays [H, W, 3], got an item {_described(image)}")


def _mask(mask: Any) -> Image.Image:
    if isinstance(mask, Image.Image):
        return as_mask(mask)
    if isinstance(mask, np.ndarray) and mask.dtype in (np.uint8, np.bool_) and mask.ndim == 2:
        return Image.fromarray(mask if mask.dtype == np.uint8 else mask.astype(np.uint8) * 255)
    raise UserError(f"masks must be PIL images, or uint8 or bool arrays [H, W], got an item {_described(mask)}")


def _described(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else f"{value!r:.80}"


def _placed(image: Image.Image, mask: Image.Image | None, size: tuple[Any, Any], init: InitConfig) -> PlacedPicture:
    if mask is not None:
        check_mask(mask, (image.height, image.width))
    own = scaled_size((image.height, image.width), init.scale)
    canvas = (own[0] if size[0] is None else size[0], own[1] if size[1] is None else size[1])
    if init.place is None:
        check_aspect(own, canvas)
        return place_picture(image, mask, canvas, resample=init.resample)
    return place_picture(image, mask, canvas, locate(init.place, own, canvas), init.scale, init.resample)
