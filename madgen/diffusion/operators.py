"""Merge operators: what each view contributes to a canvas cell.

An operator is a table of shares, one for each cell of each view; the shares of a canvas cell add up to 1. Uniform
averaging has 1 over the number of views (MultiDiffusion), weights favour the middle of a view (Guided Fusion, Mixture
of Diffusers), and swapping has 1 for one view and 0 for the others (SaFa).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from madgen.diffusion.merge import merge, split, total
from madgen.diffusion.views import Axis, Views

GAUSSIAN_VARIANCE = 0.01
"""Variance of Gaussian weights, in units of the squared size of a view (Mixture of Diffusers)."""


@dataclass(frozen=True)
class MergeOperator:
    """Merge the views of a canvas; see `method.merge` of the job."""

    operator: str = "average"
    """`average` or `swap`."""
    weights: str = "uniform"
    """Weights of `average`: `uniform`, `radial` or `gaussian`."""
    width: int = 1
    """Cells of each stripe of `swap`."""
    first_step: int = 0
    """First step in which the operator applies; earlier steps take the plain mean."""

    @property
    def is_mean(self) -> bool:
        """Return whether the operator is the plain mean in every step."""
        return self.operator == "average" and self.weights == "uniform"

    def split(self, latents_BCHW: Tensor, views: Views, step: int) -> Tensor:
        """Return the views [B, V, C, h, w] to denoise."""
        return split(latents_BCHW, views)

    def merge(self, views_BVChw: Tensor, views: Views, step: int) -> Tensor:
        """Merge what was computed for the views to a canvas [B, C, H, W]."""
        plain = self.is_mean or step < self.first_step or views.count == 1
        return merge(views_BVChw, views, None if plain else self.shares(views, views_BVChw.dtype, views_BVChw.device))

    def after_step(self, latents_BCHW: Tensor, views: Views, step: int) -> Tensor:
        """Return the latents to continue with after a scheduler step, which this operator does not change."""
        return latents_BCHW

    def shares(self, views: Views, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the share of each cell of each view [V, h, w], rounded from float64."""
        if self.operator == "swap":
            return _swap_shares(views, self.width, dtype, device)
        return _weighted_shares(views, self.weights, dtype, device)


def radial_weights(height: int, width: int) -> Tensor:
    """Return weights [height, width], float64, that fall linearly from the middle (Guided Fusion).

    They are 1 at the middle cell and 0 at the first one, the only zero of a square view.
    """
    rows, columns = (torch.arange(size, dtype=torch.float64) - size / 2 for size in (height, width))
    distance = torch.hypot(rows[:, None], columns[None])
    return (1 - distance / math.hypot(height / 2, width / 2)).clamp(min=0)


def gaussian_weights(height: int, width: int) -> Tensor:
    """Return weights [height, width], float64, as in the released code of Mixture of Diffusers.

    That code centres the columns at (width - 1) / 2, but the rows at height / 2.
    """

    def along(size: int, middle: float) -> Tensor:
        cells = torch.arange(size, dtype=torch.float64) - middle
        normalized = math.sqrt(2 * math.pi * GAUSSIAN_VARIANCE)
        return torch.exp(-(cells**2) / (size * size) / (2 * GAUSSIAN_VARIANCE)) / normalized

    return along(height, height / 2)[:, None] * along(width, (width - 1) / 2)[None]


WEIGHTS = {"radial": radial_weights, "gaussian": gaussian_weights}
"""Weights of a view by name; `uniform` needs none."""


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # tables are kept, and gradients may pass through them later
def _weighted_shares(views: Views, weights: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return each cell's weight over the sum of all weights on its canvas cell.

    Cells without any weight, such as the corner of radial weights, are averaged: a single view there counts in full.
    """
    cells = WEIGHTS[weights](views.rows.size, views.columns.size).expand(views.count, -1, -1)
    sums, counts = (split(total(of_views[None, :, None], views), views)[0, :, 0] for of_views in (cells, cells * 0 + 1))
    shares = torch.where(sums > 0, cells / sums, 1 / counts)
    return shares.to(device, dtype)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _swap_shares(views: Views, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return 1 for the selected view of each canvas cell and 0 for the others; on grids in both directions."""
    rows, columns = (_selected(axis, width) for axis in (views.rows, views.columns))
    shares = rows[:, None, :, None] & columns[None, :, None, :]  # [Y, X, h, w]
    return shares.flatten(0, 1).to(device, dtype)


def _selected(axis: Axis, width: int) -> Tensor:
    """Return which cells of which views are selected along one direction [views, size].

    Between two borders of views the same views lie on each cell. Stripes of `width` cells take them in turn, beginning
    with the view that starts last (the right-hand or lower one).
    """
    borders = {edge % axis.extent for start in axis.starts for edge in (start, start + axis.size)}
    selected = [False] * len(axis.cells)
    since = 0
    for offset in range(axis.extent):  # begin at a border, also on a loop
        cell = (axis.starts[0] + offset) % axis.extent
        since = 0 if cell in borders else since + 1
        latest_first = sorted(axis.covers[cell], key=lambda position: position % axis.size)
        selected[latest_first[since // width % len(latest_first)]] = True
    return torch.tensor(selected).view(len(axis.starts), axis.size)
