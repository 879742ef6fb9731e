"""Tokens of transformers: latent cells packed into tokens, and the positions of the canvas's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from madgen.diffusion.merge import grid_of, merge_cells, split_cells
from madgen.diffusion.views import Views

if TYPE_CHECKING:
    from torch import Tensor


def canvas_of(views_BVChw: Tensor, views: Views) -> Tensor:
    """Return the canvas [B, C, H, W] that views were split from: the first view's value for each cell."""
    grid = grid_of(views, views_BVChw.device)
    rows, columns = grid.rows, grid.columns
    cells = views_BVChw.unflatten(1, (rows.count, columns.count)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    if rows.cells is not None:
        cells = cells.index_select(2, rows.positions[0])
    if columns.cells is not None:
        cells = cells.index_select(3, columns.positions[0])
    return cells.contiguous()


def split_positions(table_1HWD: Tensor, tokens: Views) -> Tensor:
    """Return the views' part of a table of the canvas's tokens: [1, H, W, D] to [V, h * w, D]."""
    return split_cells(table_1HWD, grid_of(tokens, table_1HWD.device))[0].flatten(1, 2)


def pack(cells_MChw: Tensor) -> Tensor:
    """Turn 2x2 latent cells into tokens: [M, C, h, w] to [M, h / 2 * w / 2, 4 * C], as diffusers' FLUX pipelines."""
    count, channels, height, width = cells_MChw.shape
    cells = cells_MChw.reshape(count, channels, height // 2, 2, width // 2, 2)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(count, -1, 4 * channels)


def unpack(tokens_MLD: Tensor, height: int, width: int) -> Tensor:
    """Invert `pack` for views of `height` x `width` latent cells."""
    cells = tokens_MLD.reshape(len(tokens_MLD), height // 2, width // 2, -1, 2, 2)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens_MLD), -1, height, width)


def token_ids(height: int, width: int, device: torch.device) -> Tensor:
    """Return FLUX's ids (0, row, column) of `height` x `width` tokens [L, 3]."""
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    return torch.cartesian_prod(torch.zeros(1, device=device, dtype=torch.int64), rows, columns).float()


def canvas_ids(tokens: Views, positions: str, device: torch.device, centred: bool = False) -> Tensor:
    """Return FLUX's ids of the canvas's tokens in merged layers [H * W, 3].

    `canvas`: their place on the canvas. `fit`: the same, scaled into the range of a view. `local`: the mean of their
    places in the views that cover them. `centred`: rows and columns are counted from the middle.
    """
    rows, columns = tokens.rows, tokens.columns

    def ids_of(height: int, width: int) -> Tensor:
        ids = token_ids(height, width, device)
        return ids - ids.new_tensor([0, height - height // 2, width - width // 2]) if centred else ids

    if positions == "local":
        local = ids_of(rows.size, columns.size).expand(1, tokens.count, -1, -1)
        cells = local.unflatten(2, (rows.size, columns.size))
        return merge_cells(cells, grid_of(tokens, device)).flatten(1, 2)[0]
    ids = ids_of(rows.extent, columns.extent)
    if positions == "fit":
        ids = ids * ids.new_tensor([1, rows.size / rows.extent, columns.size / columns.extent])
    return ids


def rotations(ids: Tensor, widths: Sequence[int], theta: float) -> Tensor:
    """Return rotations by `position * frequency`, complex64 [..., sum(widths) / 2], of ids [..., axes].

    Ids may be fractions. `widths`: width of a head that each axis rotates.
    """
    angles = []
    for axis, width in enumerate(widths):
        exponents = torch.arange(0, width, 2, dtype=torch.float64, device=ids.device) / width
        angles.append(ids[..., axis, None].double() / theta**exponents)
    angle = torch.cat(angles, dim=-1).float()
    return torch.polar(torch.ones_like(angle), angle)
