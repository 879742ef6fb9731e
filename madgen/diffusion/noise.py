"""Initial noise of joint diffusion."""

from __future__ import annotations

import torch
from torch import Tensor


def align(noise_BCHW: Tensor, view_BChw: Tensor, share: float) -> Tensor:
    """Interpolate the noise of each canvas spherically towards one view's noise, tiled (Guided Fusion's alignment).

    `share` 0 is the noise itself, 1 the tiles. Both are unit Gaussian noise, and so is what lies between them.
    """
    _, _, height, width = noise_BCHW.shape
    repeats = (1, 1, -(-height // view_BChw.shape[-2]), -(-width // view_BChw.shape[-1]))
    tiles_BCHW = view_BChw.repeat(repeats)[..., :height, :width]
    if share in (0, 1):
        return tiles_BCHW if share else noise_BCHW
    start, end = noise_BCHW.double(), tiles_BCHW.double()
    dims = (1, 2, 3)
    lengths = torch.linalg.vector_norm(start, dim=dims) * torch.linalg.vector_norm(end, dim=dims)
    angle = torch.acos((start * end).sum(dims) / lengths).view(-1, 1, 1, 1)
    between = (torch.sin((1 - share) * angle) * start + torch.sin(share * angle) * end) / torch.sin(angle)
    return between.to(noise_BCHW.dtype)
