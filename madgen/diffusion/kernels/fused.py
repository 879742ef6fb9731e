"""Split and merge views in one pass over the memory, on NVIDIA GPUs: `merge.py` on rows of channels.

PyTorch's own operations take six passes for a merge of four views, and two for a split; in a merged step of Stable
Diffusion 2's shape that is a twelfth of the time (H200). Triton comes with PyTorch's CUDA builds.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from madgen.diffusion.views import Axis, Views

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

CELLS, CHANNELS = 32, 64
"""Block size of a kernel program."""
MAX_DEPTH = 64
"""Largest number of views on a cell: the kernel is unrolled over them, which takes seconds to compile."""


@dataclass(frozen=True)
class Rows:
    """`Views` of both directions at once, on a device; cells of a canvas or a view are numbered row by row."""

    cells: Tensor
    """Canvas cell of every cell of every view [V * h * w]."""
    positions: Tensor
    """Positions of each canvas cell in `cells`, the earlier view first, -1 beyond the last one [K, H * W]."""
    covers: Tensor
    """Number of views on each canvas cell, float32 [H * W]."""


def is_possible(device: torch.device) -> bool:
    """Return whether the kernels run on a device."""
    return device.type == "cuda" and torch.version.hip is None and _kernels() is not None


def rows_of(views: Views, device: torch.device) -> Rows:
    """Return the tables of the views on a device."""
    down, across = views.rows, views.columns
    first = torch.tensor(down.cells).view(-1, 1, down.size, 1) * across.extent
    cells = (first + torch.tensor(across.cells).view(1, -1, 1, across.size)).flatten()
    (row, y), (column, x) = _positions(down), _positions(across)  # views and positions [k, extent]
    count, y, row = len(across.starts), y[:, None, :, None], row[:, None, :, None]
    positions = ((row * count + column[None, :, None]) * down.size + y) * across.size + x[None, :, None]
    positions = positions.where((row >= 0) & (column >= 0)[None, :, None], -1).flatten(0, 1).flatten(1)
    covers = (positions >= 0).sum(0).float()
    return Rows(cells.int().to(device), positions.int().contiguous().to(device), covers.to(device))


def _positions(axis: Axis) -> tuple[Tensor, Tensor]:
    """Return the views on each cell and its position in them, [k, extent]; view -1: fewer than k views."""
    found = torch.tensor([[*positions, *[-axis.size] * (axis.depth - len(positions))] for positions in axis.covers]).T
    return found.div(axis.size, rounding_mode="floor"), found % axis.size


def takes(hidden: Tensor) -> bool:
    """Return whether the kernels accept a tensor; they compute no gradients."""
    differentiable = hidden.requires_grad and torch.is_grad_enabled()
    supported = hidden.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return hidden.is_contiguous() and not differentiable and supported and _works(hidden.device, hidden.dtype)


@cache
def _works(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether Triton compiles the kernels, which needs a C compiler, and their results are right."""
    views = Views(Axis(1, 1, (0,)), Axis(3, 2, (0, 1)))
    rows, canvas = rows_of(views, device), torch.tensor([[[3.0], [5.0], [7.0]]], device=device, dtype=dtype)
    try:
        if torch.allclose(merge(split(canvas, rows), rows), canvas, rtol=0.01):
            return True
        why = "wrong results"
    except Exception as error:  # from Triton, the C compiler or the driver
        if "out of memory" in str(error):  # there may be memory the next time
            raise
        why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    logger.warning("Triton kernels are disabled for %s, which is slower: %s", dtype, why)
    return False


def split(canvas_BLD: Tensor, rows: Rows) -> Tensor:
    """Gather the cells of the views [B, V * h * w, D] from a canvas [B, H * W, D]."""
    batch, _, width = canvas_BLD.shape
    output = canvas_BLD.new_empty(batch, len(rows.cells), width)
    _launch(_kernels().split, output, canvas_BLD, rows.cells)
    return output


def merge(views_BKD: Tensor, rows: Rows) -> Tensor:
    """Average the cells of the views [B, V * h * w, D] on each canvas cell [B, H * W, D], accumulated in float32."""
    batch, _, width = views_BKD.shape
    output = views_BKD.new_empty(batch, len(rows.covers), width)
    _launch(_kernels().merge, output, views_BKD, rows.positions, rows.covers, DEPTH=len(rows.positions))
    return output


def _launch(kernel: Any, output: Tensor, source: Tensor, *tables: Tensor, **options: int) -> None:
    batch, count, width = output.shape
    grid = (-(-count // CELLS), -(-width // CHANNELS), batch)
    with torch.cuda.device_of(output):  # Triton launches on the current one
        kernel[grid](output, source, *tables, count, source.shape[1], width, CELLS=CELLS, CHANNELS=CHANNELS, **options)


@cache
def _kernels() -> Any:
    try:
        from madgen.diffusion.kernels import triton_kernels as _kernels
    except ImportError:  # PyTorch for Windows comes without Triton
        return None
    return _kernels
