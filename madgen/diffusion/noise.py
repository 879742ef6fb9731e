"""Initial noise of joint diffusion."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def align(noise_BCHW: Tensor, view_BChw: Tensor, share: float) -> Tensor:
    """Interpolate the noise of each canvas spherically towards one view's noise, tiled (Guided Fusion's alignment).

    `share` 0 is the noise itself, 1 the tiles. Both are unit Gaussian noise, and so is what lies between them.
    """
    _, _, height, width = noise_BCHW.shape
    repeats = (1, 1, -(-height // view_BChw.shape[-2]), -(-width // view_BChw.shape[-1]))
    return slerp(noise_BCHW, view_BChw.repeat(repeats)[..., :height, :width], share)


def blend(noise_BCHW: Tensor, other_BCHW: Tensor, shares: Sequence[float]) -> Tensor:
    """Interpolate the noise of each canvas spherically towards other noise, each with a share of 0..1."""
    pairs = zip(noise_BCHW.split(1), other_BCHW.split(1), shares, strict=True)
    return torch.cat([slerp(noise, other, share) for noise, other, share in pairs])


def slerp(start_BCHW: Tensor, end_BCHW: Tensor, share: float) -> Tensor:
    """Interpolate each canvas spherically, which keeps the variance: `share` 0 is the start, 1 the end."""
    if share in (0, 1):
        return end_BCHW if share else start_BCHW
    start, end = start_BCHW.double(), end_BCHW.double()
    dims = (1, 2, 3)
    lengths = torch.linalg.vector_norm(start, dim=dims) * torch.linalg.vector_norm(end, dim=dims)
    angle = torch.acos((start * end).sum(dims) / lengths).view(-1, 1, 1, 1)
    between = (torch.sin((1 - share) * angle) * start + torch.sin(share * angle) * end) / torch.sin(angle)
    return torch.where(between.isfinite(), between, start).to(start_BCHW.dtype)  # equal noise has no angle


def in_patches(draw: Callable[[int, int, int], Tensor], channels: int, height: int, width: int, side: int) -> Tensor:
    """Draw noise [B, channels, height, width] as that of patches of `side` x `side` cells, whose cells are channels.

    `draw` takes channels, height and width.
    """
    if side == 1:
        return draw(channels, height, width)
    patches = draw(channels * side**2, -(-height // side), -(-width // side))
    return torch.pixel_shuffle(patches, side)[..., :height, :width].contiguous()
