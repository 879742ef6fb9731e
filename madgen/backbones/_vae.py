"""Decode and encode with a diffusers VAE: whole or tile by tile, and across the edge of a loop.

Tiling does not use diffusers': its last tile is the remainder, and a narrow remainder, normalised over few cells, shows
as a band (up to 0.4 of the value range on the demo backbone, where these tiles differ by 0.03).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from madgen.backbones import Backbone


def is_video(config: Mapping[str, Any]) -> bool:
    """Return whether a VAE's config is that of a video model, whose tensors have a dimension of frames."""
    return "temperal_downsample" in config


def factor_of(config: Mapping[str, Any]) -> int:
    """Return the pixels per latent cell of a VAE, in each direction."""
    levels = config["temperal_downsample"] if is_video(config) else config["block_out_channels"][1:]
    return 2 ** len(levels)


def decoder_activations(config: Mapping[str, Any]) -> float:
    """Return the numbers that are alive at the decoder's peak, per pixel: measured, in units of its channels there."""
    if is_video(config):
        return 11.0 * config["base_dim"] * config["dim_mult"][min(1, len(config["dim_mult"]) - 1)]
    return 4.8 * config["block_out_channels"][:2][-1]


def decode(vae: Any, factor: int, latents_BCHW: Tensor, wrap: int = 0, tile: int | None = None) -> Tensor:
    """Decode to pixels in 0..1, float32 [B, 3, H * factor, W * factor], one panorama at a time to bound the memory.

    `wrap` > 0 is for a loop: number of latent cells of the other end that the decoder sees beyond each edge. `tile`:
    largest side of a tile in latent cells; None decodes the whole canvas in one pass.
    """
    wrap = min(wrap, latents_BCHW.shape[-1])
    latents, edge = _wrapped(unscaled(vae, latents_BCHW).to(vae.dtype), wrap), wrap * factor
    height, width = latents.shape[-2:]
    parts = (_in_tiles(height, width, tile, factor, partial(_pixels, vae, latent)) for latent in latents.split(1))
    pixels = torch.cat(list(parts))
    return (pixels[..., edge : pixels.shape[-1] - edge] / 2 + 0.5).clamp(0, 1)


def unscaled(vae: Any, latents_BCHW: Tensor) -> Tensor:
    """Undo the scaling of latents that the network was trained with."""
    config: Mapping[str, Any] = vae.config
    if getattr(vae, "bn", None) is not None:
        return _unnormalized(vae, latents_BCHW)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        shape = (1, -1, 1, 1)
        means, stds = latents_BCHW.new_tensor(mean).view(shape), latents_BCHW.new_tensor(std).view(shape)
        return latents_BCHW * stds / config.get("scaling_factor", 1.0) + means
    return latents_BCHW * (1 / config["scaling_factor"]) + (config.get("shift_factor") or 0.0)


def _unnormalized(vae: Any, latents_BCHW: Tensor) -> Tensor:
    """Undo the batch normalization of 2x2 patches of latents, whose statistics the VAE holds."""
    height, width = latents_BCHW.shape[-2:]
    statistics = vae.bn.running_mean, torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
    mean, std = (
        torch.pixel_shuffle(each.to(latents_BCHW).view(1, -1, 1, 1), 2).tile(-(-height // 2), -(-width // 2))
        for each in statistics
    )
    return latents_BCHW * std[..., :height, :width] + mean[..., :height, :width]


def encode(vae: Any, pixels_B3HW: Tensor) -> Tensor:
    """Encode pixels in 0..1 to the posterior mean, float32 [B, C, H / factor, W / factor]."""
    pixels = (pixels_B3HW * 2 - 1).to(vae.dtype)
    encoded = vae.encode(pixels[:, :, None] if is_video(vae.config) else pixels)
    latents = (encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latents).float()  # a tiny VAE
    latents = latents[:, :, 0] if is_video(vae.config) else latents
    # `unscaled` is affine in each channel: a * x + b
    offset = unscaled(vae, torch.zeros_like(latents[:1]))
    slope = unscaled(vae, torch.ones_like(offset)) - offset
    return (latents - offset) / slope


def _pixels(vae: Any, latents_1CHW: Tensor, rows: slice, columns: slice) -> Tensor:
    """Decode a part of latents to pixels in -1..1, float32; a video VAE gets one frame."""
    cells_1Chw = latents_1CHW[..., rows, columns]
    if is_video(vae.config):
        return vae.decode(cells_1Chw[:, :, None], return_dict=False)[0][:, :, 0].float()
    return vae.decode(cells_1Chw, return_dict=False)[0].float()


def _wrapped(values: Tensor, edge: int) -> Tensor:
    """Return `edge` columns of the other end beyond each edge."""
    return torch.cat([values[..., -edge:], values, values[..., :edge]], dim=-1) if edge else values


def _in_tiles(
    height: int, width: int, tile: int | None, scale: int, compute: Callable[[slice, slice], Tensor]
) -> Tensor:
    """Compute [1, C, height * scale, width * scale] in overlapping tiles, which are blended.

    `compute` gets the rows and columns of a tile. `tile`: their largest number; None: one tile.
    """
    if tile is None or max(height, width) <= tile:
        return compute(slice(height), slice(width))
    down, across = min(tile, height), min(tile, width)
    total: Tensor | None = None
    for top, fade_down in _faded(height, down, scale):
        for left, fade_across in _faded(width, across, scale):
            part = compute(slice(top, top + down), slice(left, left + across))
            if total is None:
                total = part.new_zeros((*part.shape[:2], height * scale, width * scale))
            rows, columns = slice(top * scale, (top + down) * scale), slice(left * scale, (left + across) * scale)
            total[..., rows, columns] += part * (fade_down.to(part.device)[:, None] * fade_across.to(part.device))
    assert total is not None
    return total


def tile_starts(extent: int, tile: int) -> list[int]:
    """Return the first cells of equal tiles, evenly spaced from edge to edge, overlapping by at least a quarter."""
    count = math.ceil((extent - tile // 4) / (tile - tile // 4)) if extent > tile else 1
    return [index * (extent - tile) // max(1, count - 1) for index in range(count)]


def _faded(extent: int, tile: int, factor: int) -> list[tuple[int, Tensor]]:
    """Return each tile's first cell and weights [tile * factor], which sum to 1 at every pixel of the axis."""
    starts = tile_starts(extent, tile)
    pixels = torch.arange(extent * factor, dtype=torch.float32) + 0.5
    remaining, tiles = torch.ones_like(pixels), []  # weight that later tiles leave
    for before, start in reversed(list(pairwise([-tile, *starts]))):
        # From 0 at this tile's first pixel to 1 at the end of the previous tile; 1 throughout for the first tile.
        rise = ((pixels - start * factor) / ((before + tile - start) * factor)).clamp(0, 1)
        tiles.append((start, (remaining * rise)[start * factor : (start + tile) * factor]))
        remaining = remaining * (1 - rise)
    return tiles[::-1]


def encode_canvas(backbone: Backbone, pixels_13HW: Tensor, wrap: int = 0, tile: int | None = None) -> Tensor:
    """Encode pixels in 0..1 as `decode` decodes: across the edge of a loop, and in tiles. `wrap`, `tile`: see there.

    Returns float32 [1, C, H / factor, W / factor].
    """
    factor, patch = backbone.spec.factor, backbone.spec.patch
    wrap = min(wrap, pixels_13HW.shape[-1] // factor)
    pixels_13HW = _wrapped(pixels_13HW, wrap * factor)
    side = factor * patch  # tiles are of whole tokens: some VAEs normalize cells by their place in a token

    def encoded(rows: slice, columns: slice) -> Tensor:
        rows, columns = (slice(side * (part.start or 0), side * part.stop) for part in (rows, columns))
        return backbone.encode(pixels_13HW[..., rows, columns])

    height, width = (extent // side for extent in pixels_13HW.shape[-2:])
    latents = _in_tiles(height, width, None if tile is None else tile // patch, patch, encoded)
    return latents[..., wrap : latents.shape[-1] - wrap]
