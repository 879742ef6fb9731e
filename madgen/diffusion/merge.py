"""Split a canvas into views and merge views: `merge(split(x)) == x`.

Merging adds up, for each canvas cell, the view cells that lie on it, in the order of the views. It never scatters with
atomics, so the order of the additions, and with it the last bit, is the same on every run. Shares, such as weights or a
selection, are applied in the same pass over the memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from madgen.diffusion.kernels import fused
from madgen.diffusion.views import Axis, Views

if TYPE_CHECKING:
    from torch import Tensor


def split(canvas_BCHW: Tensor, views: Views) -> Tensor:
    """Cut a canvas [B, C, H, W] into views [B, V, C, h, w]."""
    cells = split_cells(canvas_BCHW.permute(0, 2, 3, 1), grid_of(views, canvas_BCHW.device))
    return cells.permute(0, 1, 4, 2, 3).contiguous()


def merge(views_BVChw: Tensor, views: Views, shares_Vhw: Tensor | None = None) -> Tensor:
    """Merge views into a canvas [B, C, H, W].

    Each canvas cell is the mean of the views on it (MultiDiffusion, Eq. 5), or with `shares_Vhw`, which add up to 1 in
    every canvas cell, the sum of the views times their shares.
    """
    cells = merge_cells(views_BVChw.permute(0, 1, 3, 4, 2), grid_of(views, views_BVChw.device), shares_Vhw)
    return cells.permute(0, 3, 1, 2).contiguous()


def total(views_BVChw: Tensor, views: Views) -> Tensor:
    """Add up the views on each canvas cell [B, C, H, W]."""
    return merge(views_BVChw, views, torch.ones_like(views_BVChw[0, :, 0]))


@dataclass(frozen=True)
class AxisGrid:
    """One direction of `Views` as tensors on a device; K is the largest number of views on a cell."""

    extent: int
    size: int
    count: int
    """Number of views."""
    cells: Tensor | None
    """Canvas cell of every cell of every view [count * size]; None: one view is the canvas."""
    positions: tuple[Tensor, ...] = ()
    """K tensors [extent]: the k-th position of each canvas cell in `cells`."""
    present: tuple[Tensor | None, ...] = ()
    """K tensors [extent]: 1.0 for cells with a k-th view, else 0.0; None: all have one."""
    covers: Tensor | None = None
    """Number of views on each canvas cell [extent]."""
    stride: int | None = None
    """Stride of the views, if it is constant, divides their size, and no view wraps; else None."""


@dataclass(frozen=True)
class Grid:
    """`Views` on a device, ready to split and merge. Compiled graphs take its tensors as inputs."""

    rows: AxisGrid
    columns: AxisGrid
    fused: fused.Rows | None = None
    """Tables of the fused kernels, if they can be used."""


@lru_cache(maxsize=1024)
def grid_of(views: Views, device: torch.device) -> Grid:
    """Return the views as a grid on a device. Grids are cached."""
    with torch.inference_mode(False):  # later gradients may pass through the tensors
        return Grid(_axis_grid(views.rows, device), _axis_grid(views.columns, device))


def with_kernels(views: Views, device: torch.device) -> Grid:
    """Return `grid_of`, with the tables of the fused kernels if they can be used."""
    grid = grid_of(views, device)
    if not fused.is_possible(device) or views.rows.depth * views.columns.depth > fused.MAX_DEPTH:
        return grid
    with torch.inference_mode(False):
        return replace(grid, fused=fused.rows_of(views, device))


def _axis_grid(axis: Axis, device: torch.device) -> AxisGrid:
    size = axis.extent, axis.size, len(axis.starts)
    if axis.is_whole:
        return AxisGrid(*size, None)
    covers = axis.covers
    positions = [[found[min(k, len(found) - 1)] for found in covers] for k in range(axis.depth)]
    present = [[float(k < len(found)) for found in covers] for k in range(axis.depth)]
    return AxisGrid(
        *size,
        torch.tensor(axis.cells, device=device),
        tuple(torch.tensor(found, device=device) for found in positions),
        tuple(None if all(found) else torch.tensor(found, dtype=torch.float32, device=device) for found in present),
        torch.tensor([len(found) for found in covers], dtype=torch.float32, device=device),
        axis.even_stride,
    )


def split_cells(canvas_BHWD: Tensor, grid: Grid) -> Tensor:
    """`split` with channels last: [B, H, W, D] to [B, V, h, w, D]."""
    rows, columns = grid.rows, grid.columns
    batch, width = canvas_BHWD.shape[0], canvas_BHWD.shape[-1]
    if not torch.compiler.is_compiling() and grid.fused is not None and fused.takes(canvas_BHWD):
        cells = fused.split(canvas_BHWD.flatten(1, 2), grid.fused)
        return cells.view(batch, rows.count * columns.count, rows.size, columns.size, width)
    cells = canvas_BHWD
    if rows.cells is not None:
        cells = cells.index_select(1, rows.cells)
    if columns.cells is not None:
        cells = cells.index_select(2, columns.cells)
    parts = cells.reshape(batch, rows.count, rows.size, columns.count, columns.size, width)
    return parts.transpose(2, 3).reshape(batch, rows.count * columns.count, rows.size, columns.size, width)


def merge_cells(views_BVhwD: Tensor, grid: Grid, shares_Vhw: Tensor | None = None) -> Tensor:
    """`merge` with channels last: [B, V, h, w, D] to [B, H, W, D]."""
    rows, columns = grid.rows, grid.columns
    batch, width = views_BVhwD.shape[0], views_BVhwD.shape[-1]
    fusible = grid.fused is not None and shares_Vhw is None and not torch.compiler.is_compiling()
    if fusible and grid.fused is not None and fused.takes(views_BVhwD):
        cells = fused.merge(views_BVhwD.flatten(1, 3), grid.fused)
        return cells.view(batch, rows.extent, columns.extent, width)
    parts = _by_direction(views_BVhwD, grid)
    if shares_Vhw is None:
        return _average(_average(parts, columns, 3), rows, 1)
    shares = _by_direction(shares_Vhw[None, ..., None], grid).to(parts.dtype)
    if columns.cells is None:  # the shares apply in the direction that has several views
        return _sum(parts.flatten(3, 4), rows, 1, shares.flatten(3, 4))
    return _sum(_sum(parts, columns, 3, shares), rows, 1)


def _by_direction(views_BVhwD: Tensor, grid: Grid) -> Tensor:
    """Return views as [B, Y, h, X, w, D], the views of a column Y and of a row X."""
    batch, _, _, _, width = views_BVhwD.shape
    rows, columns = grid.rows, grid.columns
    return views_BVhwD.reshape(batch, rows.count, columns.count, rows.size, columns.size, width).transpose(2, 3)


def _average(views: Tensor, axis: AxisGrid, dim: int) -> Tensor:
    """Average over `dim` (the views) and `dim` + 1 (their cells), which become one: the canvas's cells."""
    if axis.cells is None:
        return views.flatten(dim, dim + 1)
    assert axis.covers is not None
    total = _sum(views, axis, dim)
    return total / _along(axis.covers, dim, total)


def _sum(views: Tensor, axis: AxisGrid, dim: int, shares: Tensor | None = None) -> Tensor:
    """Add up instead of averaging; `shares`: factors of the views' cells."""
    if axis.cells is None:
        return views.flatten(dim, dim + 1)
    by_pieces = axis.stride is not None and not torch.compiler.is_compiling()
    return (_pieces if by_pieces else _cells)(views, axis, dim, shares)


def _pieces(views: Tensor, axis: AxisGrid, dim: int, shares: Tensor | None) -> Tensor:
    """Add up in pieces of one stride: a piece of a view lies on the piece before it of the next view."""
    assert axis.stride is not None
    depth = axis.size // axis.stride
    pieces = views.unflatten(dim + 1, (depth, axis.stride))
    of_pieces = None if shares is None else shares.unflatten(dim + 1, (depth, axis.stride))
    shape = list(pieces.shape)
    shape[dim : dim + 2] = [axis.count + depth - 1]
    total = pieces.new_zeros(shape)
    for piece in reversed(range(depth)):  # the earlier view first
        part = total.narrow(dim, piece, axis.count)
        if of_pieces is None:
            part.add_(pieces.select(dim + 1, piece))
        else:
            part.addcmul_(pieces.select(dim + 1, piece), of_pieces.select(dim + 1, piece))
    return total.flatten(dim, dim + 1)


def _cells(views: Tensor, axis: AxisGrid, dim: int, shares: Tensor | None) -> Tensor:
    """Add up cell by cell."""
    cells = views.flatten(dim, dim + 1)
    of_cells = None if shares is None else shares.flatten(dim, dim + 1)
    total = cells.index_select(dim, axis.positions[0])
    if of_cells is not None:
        total *= of_cells.index_select(dim, axis.positions[0])
    for position, present in zip(axis.positions[1:], axis.present[1:], strict=True):
        found = cells.index_select(dim, position)
        factor = None if present is None else _along(present, dim, total)
        if of_cells is not None:
            share = of_cells.index_select(dim, position)
            factor = share if factor is None else share * factor
        total = total + found if factor is None else torch.addcmul(total, found, factor)
    return total


def _along(values: Tensor, dim: int, other: Tensor) -> Tensor:
    """Reshape values [extent] to multiply `other` along `dim`."""
    shape = [1] * other.ndim
    shape[dim] = len(values)
    return values.view(shape).to(other.dtype)
