"""Several prompts on one canvas, each under its mask (MultiDiffusion, Sec. 4.2; the region-based code of MAD).

Letters: B canvases, R >= B rows, a row for each prompt of each canvas, the canvas's own prompt (background) first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Composition:
    """Distribute canvases over rows before the denoiser, and compose them again after it: here a canvas is one row."""

    def rows(self, latents_BCHW: Tensor, scheduler: Any, timestep: Tensor, step: int) -> Tensor:
        """Return the latents of each row [R, C, H, W]."""
        return latents_BCHW

    def compose(self, rows_RCHW: Tensor) -> Tensor:
        """Compose what was predicted for the rows into canvases [B, C, H, W]."""
        return rows_RCHW


@dataclass(frozen=True)
class Bootstrap:
    """Bootstrapping: in the first steps the latents outside a region's mask are a noised plain colour.

    What its prompt describes then grows inside the mask, instead of being cut out of something larger.
    """

    steps: int
    colours_KRC: Tensor
    """Latents of K >= 1 random colours for each row; step k takes the colour k modulo K."""
    noise_RCHW: Tensor
    """Initial noise of the rows, added to the colours."""
    active_R: Tensor
    """True for rows that are bootstrapped: the regions, not the backgrounds."""


class Regions(Composition):
    """Average rows under their masks.

    `masks_RHW`: weights >= 0; `counts`: the number of rows of each canvas. Raises ValueError for a cell in which all
    weights of a canvas are zero.
    """

    def __init__(self, masks_RHW: Tensor, counts: list[int], bootstrap: Bootstrap | None = None):
        if sum(counts) != len(masks_RHW):
            raise ValueError(f"{counts} rows need as many masks, got {len(masks_RHW)}")
        self.masks_R1HW, self.counts, self.bootstrap = masks_RHW[:, None], counts, bootstrap
        rows = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        self.canvases_R = rows.to(masks_RHW.device)  # computed once, as it synchronizes with the GPU
        self.totals = [masks.sum(0) for masks in self.masks_R1HW.split(counts)]
        if not all(bool((total > 0).all()) for total in self.totals):
            raise ValueError("the masks leave cells of the canvas without a prompt")

    def rows(self, latents_BCHW: Tensor, scheduler: Any, timestep: Tensor, step: int) -> Tensor:
        repeated = latents_BCHW[self.canvases_R]
        bootstrap = self.bootstrap
        if bootstrap is None or step >= bootstrap.steps:
            return repeated
        colours = bootstrap.colours_KRC[step % len(bootstrap.colours_KRC), :, :, None, None]
        times = timestep.reshape(1).expand(len(repeated))
        backdrop = scheduler.add_noise(colours.expand_as(repeated), bootstrap.noise_RCHW, times)
        inside = torch.where(bootstrap.active_R[:, None, None, None], self.masks_R1HW, 1.0)
        return repeated * inside + backdrop * (1 - inside)

    def compose(self, rows_RCHW: Tensor) -> Tensor:
        weighted = (rows_RCHW * self.masks_R1HW).split(self.counts)
        return torch.stack([rows.sum(0) / total for rows, total in zip(weighted, self.totals, strict=True)])


def with_background(masks_RHW: Tensor) -> Tensor:
    """Prepend the mask of what no region covers, [R + 1, H, W]: 1 minus the sum of the regions, clamped at 0."""
    return torch.cat([(1 - masks_RHW.sum(0, keepdim=True)).clamp(min=0), masks_RHW])
