"""Latents to pixels with a diffusers VAE: whole or tile by tile, and around the edge of a loop."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

OVERLAP = 0.25  # of a tile, shared with each neighbour and blended


def decode(vae: Any, factor: int, latents_BCHW: Tensor, wrap: int = 0, tile: int | None = None) -> Tensor:
    """Pixels in 0..1, float32 [B, 3, H * factor, W * factor], one panorama at a time, which bounds the memory.

    `wrap` > 0 is for a loop: the decoder sees that many latent cells of the other end beyond each edge. `tile`: the
    largest side in latent cells of what is decoded at once; None decodes the whole canvas in one pass.
    """
    latents = unscaled(vae.config, latents_BCHW).to(vae.dtype)
    if wrap:
        wrap = min(wrap, latents.shape[-1])
        latents = torch.cat([latents[..., -wrap:], latents, latents[..., :wrap]], dim=-1)
    height, width = latents.shape[-2:]
    with _tiling(vae, None if tile is None else tile_size(height, width, tile), factor):
        pixels = torch.cat([vae.decode(latent[None], return_dict=False)[0].float() for latent in latents])
    edge = wrap * factor
    return (pixels[..., edge : pixels.shape[-1] - edge] / 2 + 0.5).clamp(0, 1)


def unscaled(config: Mapping[str, Any], latents_BCHW: Tensor) -> Tensor:
    """Latents as the decoder takes them: the inverse of the scaling that the UNet was trained with."""
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        shape = (1, -1, 1, 1)
        means, stds = latents_BCHW.new_tensor(mean).view(shape), latents_BCHW.new_tensor(std).view(shape)
        return latents_BCHW * stds / config["scaling_factor"] + means
    return latents_BCHW / config["scaling_factor"] + (config.get("shift_factor") or 0.0)


def tile_size(height: int, width: int, most: int) -> int:
    """The side of the tiles for a canvas, in latent cells: at most `most`, more than two thirds of it.

    diffusers cuts tiles from the left and the top; the last one is what is left. A narrow rest is normalised by its
    few cells alone and shows as a band: of the possible sizes this takes the one with the widest rest.
    """
    return max(range(most - most % 4, most * 2 // 3, -4), key=lambda size: (_narrowest(height, width, size), size))


def _narrowest(height: int, width: int, size: int) -> float:
    """The last tile's share of a tile, in the direction in which it is smaller; 1 where there is only one tile."""
    stride = int(size * (1 - OVERLAP))
    rests = [extent - (math.ceil(extent / stride) - 1) * stride for extent in (height, width) if extent > stride]
    return min([rest / size for rest in rests], default=1.0)


@contextmanager
def _tiling(vae: Any, tile: int | None, factor: int) -> Iterator[None]:
    """Sets diffusers' own tiling for one call; None switches it off."""
    wanted: dict[str, Any] = {"use_tiling": tile is not None}
    if tile is not None:
        wanted["tile_latent_min_size"], wanted["tile_sample_min_size"] = tile, tile * factor
        wanted["tile_overlap_factor"] = OVERLAP
    before = {name: getattr(vae, name) for name in wanted}
    for name, value in wanted.items():
        setattr(vae, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)
