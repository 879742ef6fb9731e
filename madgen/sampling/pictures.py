"""The pictures of a batch: those that it starts from, and those that a ControlNet and an IP-Adapter follow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from madgen.backbones import Backbone
from madgen.backbones._vae import encode_canvas
from madgen.config.schema import InitConfig, SamplingParams
from madgen.diffusion.start import FromPictures, Start
from madgen.images.decoding import read_mask, read_picture
from madgen.images.placement import PlacedPicture, feather, place_picture
from madgen.sampling.geometry import Geometry
from madgen.sampling.method import Method
from madgen.sampling.postprocess import decodes_tiled
from madgen.types import Prompt
from madgen.utils.errors import UserError

if TYPE_CHECKING:
    from madgen.sampling.inputs import PanoramaBatch


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


def keep_known(pixels_B3HW: Tensor, pictures: Sequence[PlacedPicture], params: SamplingParams) -> Tensor:
    """Return generated pixels in 0..1 with the kept parts of the pictures in place, their edges feathered."""
    result = []
    for pixels_13HW, picture in zip(pixels_B3HW.split(1), pictures, strict=True):
        if picture.known_HW is not None:
            device, weight_HW = pixels_13HW.device, feather(picture.known_HW, params.init.feather, params.loop)
            pixels_13HW = torch.lerp(pixels_13HW, _pixels(picture, device), torch.from_numpy(weight_HW).to(device))
        result.append(pixels_13HW)
    return torch.cat(result)


def canvases(pictures: Sequence[Image.Image], height: int, width: int) -> Tensor:
    """Resize pictures to the canvas as diffusers does, with Lanczos filters: pixels in 0..1, float32 [B, 3, H, W]."""
    resized = [np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS)) for picture in pictures]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 255


def check_adapters(backbone: Any, batch: PanoramaBatch, method: Method) -> None:
    """Raise UserError for control or style pictures that are missing, have no effect, or do not suit the method."""
    controlled = getattr(backbone, "controlnet", None) is not None
    styled = getattr(backbone, "style_adapter", None) is not None
    for name, argument, pictures, used, adapter, key in (
        ("control", "control_image", batch.control, controlled, "a ControlNet", "backbone.controlnet.weights"),
        ("style", "ip_adapter_image", batch.style, styled, "an IP-Adapter", "backbone.ip_adapter.weights"),
    ):
        if used and pictures is None:
            raise UserError(
                f"the backbone has {adapter}: pass {name}=[picture, ...] to sample, a picture for each panorama, or "
                f"{argument}=picture to sampler(...)"
            )
        if pictures is not None and not used:
            raise UserError(f"{name} has no effect: the backbone has no {adapter.split()[1]}; set {key}")
    method.check_adapters(controlled, styled)
