"""Latents to pixels with a diffusers VAE: whole or tile by tile, and around the edge of a loop.

The tiles are laid here and not by diffusers: its last tile is whatever is left, and a narrow rest, normalised by its
few cells alone, shows as a band (on the demo backbone up to 0.4 of the range, where these tiles differ by 0.03).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def decode(vae: Any, factor: int, latents_BCHW: Tensor, wrap: int = 0, tile: int | None = None) -> Tensor:
    """Pixels in 0..1, float32 [B, 3, H * factor, W * factor], one panorama at a time, which bounds the memory.

    `wrap` > 0 is for a loop: the decoder sees that many latent cells of the other end beyond each edge. `tile`: the
    largest side in latent cells of what is decoded at once; None decodes the whole canvas in one pass.
    """
    latents = unscaled(vae.config, latents_BCHW).to(vae.dtype)
    if wrap:
        wrap = min(wrap, latents.shape[-1])
        latents = torch.cat([latents[..., -wrap:], latents, latents[..., :wrap]], dim=-1)
    pixels = torch.cat([_decode_one(vae, factor, latent[None], tile) for latent in latents])
    edge = wrap * factor
    return (pixels[..., edge : pixels.shape[-1] - edge] / 2 + 0.5).clamp(0, 1)


def unscaled(config: Mapping[str, Any], latents_BCHW: Tensor) -> Tensor:
    """Latents as the decoder takes them: the inverse of the scaling that the UNet was trained with."""
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        shape = (1, -1, 1, 1)
        means, stds = latents_BCHW.new_tensor(mean).view(shape), latents_BCHW.new_tensor(std).view(shape)
        return latents_BCHW * stds / config["scaling_factor"] + means
    return latents_BCHW * (1 / config["scaling_factor"]) + (config.get("shift_factor") or 0.0)


def encode(vae: Any, pixels_B3HW: Tensor) -> Tensor:
    """Latents float32 [B, C, H / factor, W / factor], the posterior's mean, of pixels in 0..1."""
    config: Mapping[str, Any] = vae.config
    latents = vae.encode((pixels_B3HW * 2 - 1).to(vae.dtype)).latent_dist.mean.float()
    # `unscaled` is affine in the latents, one channel at a time: a * x + b
    offset = unscaled(config, torch.zeros_like(latents[:1, :, :1, :1]))
    slope = unscaled(config, torch.ones_like(offset)) - offset
    return (latents - offset) / slope


def _decode_one(vae: Any, factor: int, latent_1CHW: Tensor, tile: int | None) -> Tensor:
    """Pixels in -1..1 [1, 3, H * factor, W * factor]; overlapping tiles fade into each other."""
    height, width = latent_1CHW.shape[-2:]
    if tile is None or max(height, width) <= tile:
        return vae.decode(latent_1CHW, return_dict=False)[0].float()
    down, across = min(tile, height), min(tile, width)
    total = latent_1CHW.new_zeros((1, 3, height * factor, width * factor), dtype=torch.float32)
    for top, fade_down in _faded(height, down, factor):
        for left, fade_across in _faded(width, across, factor):
            cells = latent_1CHW[..., top : top + down, left : left + across]
            pixels = vae.decode(cells, return_dict=False)[0].float()
            weight = fade_down.to(pixels.device)[:, None] * fade_across.to(pixels.device)
            rows, columns = slice(top * factor, (top + down) * factor), slice(left * factor, (left + across) * factor)
            total[..., rows, columns] += pixels * weight
    return total


def tile_starts(extent: int, tile: int) -> list[int]:
    """First cells of tiles of one size, spread evenly from edge to edge; neighbours share at least a quarter."""
    count = math.ceil((extent - tile // 4) / (tile - tile // 4)) if extent > tile else 1
    return [index * (extent - tile) // max(1, count - 1) for index in range(count)]


def _faded(extent: int, tile: int, factor: int) -> list[tuple[int, Tensor]]:
    """Each tile's first cell and its weights [tile * factor], which add up to 1 at every pixel of the axis."""
    starts = tile_starts(extent, tile)
    pixels = torch.arange(extent * factor, dtype=torch.float32) + 0.5
    left, found = torch.ones_like(pixels), []  # `left`: what the tiles further on leave
    for before, start in reversed(list(pairwise([-tile, *starts]))):
        # From 0 at this tile's first pixel to 1 where the tile before it ends; 1 throughout if there is none before it.
        rise = ((pixels - start * factor) / ((before + tile - start) * factor)).clamp(0, 1)
        found.append((start, (left * rise)[start * factor : (start + tile) * factor]))
        left = left * (1 - rise)
    return found[::-1]
