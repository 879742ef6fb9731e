"""Split a canvas into views and merge views by averaging: `merge(split(x)) == x`.

Merging gathers, for each canvas cell, the view cells that lie on it. It never scatters with atomics, so the order of
the additions, and with it the last bit, is the same on every run and device.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from madgen.joint.views import Axis, Views


def split(canvas_BCHW: Tensor, views: Views) -> Tensor:
    """Views [B, V, C, h, w] of a canvas [B, C, H, W]."""
    return split_cells(canvas_BCHW.permute(0, 2, 3, 1), views).permute(0, 1, 4, 2, 3).contiguous()


def merge(views_BVChw: Tensor, views: Views) -> Tensor:
    """Canvas [B, C, H, W]: the mean of the views over each cell (MultiDiffusion, Eq. 5)."""
    return merge_cells(views_BVChw.permute(0, 1, 3, 4, 2), views).permute(0, 3, 1, 2).contiguous()


def split_cells(canvas_BHWD: Tensor, views: Views) -> Tensor:
    """`split` with channels last: [B, H, W, D] to [B, V, h, w, D]."""
    rows, columns = views.rows, views.columns
    batch, width = canvas_BHWD.shape[0], canvas_BHWD.shape[-1]
    cells = canvas_BHWD
    if not rows.is_whole:
        cells = cells.index_select(1, _cells(rows, cells.device))
    if not columns.is_whole:
        cells = cells.index_select(2, _cells(columns, cells.device))
    grid = cells.reshape(batch, len(rows.starts), rows.size, len(columns.starts), columns.size, width)
    return grid.transpose(2, 3).reshape(batch, views.count, rows.size, columns.size, width)


def merge_cells(views_BVhwD: Tensor, views: Views) -> Tensor:
    """`merge` with channels last: [B, V, h, w, D] to [B, H, W, D]."""
    rows, columns = views.rows, views.columns
    batch, width = views_BVhwD.shape[0], views_BVhwD.shape[-1]
    grid = views_BVhwD.reshape(batch, len(rows.starts), len(columns.starts), rows.size, columns.size, width)
    cells = grid.transpose(2, 3).reshape(batch, len(rows.starts) * rows.size, -1, width)
    return _average(_average(cells, columns, 2), rows, 1)


def _average(cells: Tensor, axis: Axis, dim: int) -> Tensor:
    """Means over `dim`, from the views' cells one after the other to the canvas's cells."""
    if axis.is_whole:
        return cells
    positions, present, count = _covers(axis, cells.device)
    shape = [1] * cells.ndim
    shape[dim] = axis.extent
    total = cells.index_select(dim, positions[0])
    for position, mask in zip(positions[1:], present[1:], strict=True):
        total = total + cells.index_select(dim, position) * mask.view(shape).to(cells.dtype)
    return total / count.view(shape).to(cells.dtype)


@lru_cache(maxsize=256)
def _cells(axis: Axis, device: torch.device) -> Tensor:
    return torch.tensor(axis.cells, device=device)


@lru_cache(maxsize=256)
def _covers(axis: Axis, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Per layer k: the k-th view cell on each canvas cell [K, extent] and whether there is one; the count [extent]."""
    covers = axis.covers
    depth = max(len(found) for found in covers)
    positions = [[found[min(k, len(found) - 1)] for found in covers] for k in range(depth)]
    present = [[k < len(found) for found in covers] for k in range(depth)]
    count = torch.tensor([len(found) for found in covers], device=device)
    return torch.tensor(positions, device=device), torch.tensor(present, device=device), count
