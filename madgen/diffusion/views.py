"""Positions of the views on the canvas. Integers only; positions and sizes are latent cells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from madgen.utils.errors import UserError

LAYOUTS = ("overlapping", "shifted", "whole")


def view_starts(extent: int, size: int, stride: int, loop: bool = False) -> list[int]:
    """Return the first cells of the views that cover `extent` cells exactly; on a loop the last ones wrap around.

    >>> view_starts(96, 64, 16)
    [0, 16, 32]
    """
    if not 0 < stride <= size <= extent:
        raise UserError(f"need 0 < stride <= view size <= canvas, got {stride}, {size}, {extent} (latent cells)")
    rest = (extent if loop else extent - size) % stride
    if rest:
        problem = f"views of {size} with stride {stride} cannot cover {extent} latent cells"
        if loop:
            problem = f"a loop of {extent} latent cells is not a multiple of the stride {stride}"
        raise UserError(f"{problem}; the nearest sizes are {extent - rest} and {extent - rest + stride}")
    return list(range(0, extent if loop else extent - size + 1, stride))


@dataclass(frozen=True)
class Axis:
    """The views along one direction: `starts[i] .. starts[i] + size - 1`, modulo `extent`."""

    extent: int
    size: int
    starts: tuple[int, ...]

    @property
    def is_whole(self) -> bool:
        """Return whether one view is the canvas, cell by cell."""
        return self.starts == (0,) and self.size == self.extent

    @property
    def even_stride(self) -> int | None:
        """Return the stride of views that are evenly spaced, do not wrap and consist of whole strides, else None."""
        if len(self.starts) < 2:
            return None
        stride = self.starts[1] - self.starts[0]
        even = stride > 0 and self.starts == tuple(range(0, self.extent - self.size + 1, stride))
        return stride if even and self.size % stride == 0 and self.starts[-1] + self.size == self.extent else None

    def enlarged(self, factor: int) -> Axis:
        """Return the same views on a grid `factor` times finer, as in pixels."""
        return Axis(self.extent * factor, self.size * factor, tuple(start * factor for start in self.starts))

    @property
    def borders(self) -> list[int]:
        """Return the cells inside the canvas at which a view begins or has ended."""
        edges = {edge % self.extent for start in self.starts for edge in (start, start + self.size)}
        return sorted(edges - {0})

    @cached_property
    def cells(self) -> list[int]:
        """Return the canvas cell of every cell of every view, view after view [V * size]."""
        return [(start + offset) % self.extent for start in self.starts for offset in range(self.size)]

    @cached_property
    def covers(self) -> list[list[int]]:
        """Return for every canvas cell its positions in `cells`, at least one."""
        found: list[list[int]] = [[] for _ in range(self.extent)]
        for position, cell in enumerate(self.cells):
            found[cell].append(position)
        if not all(found):
            raise ValueError(f"the views {self.starts} of size {self.size} leave cells of {self.extent} uncovered")
        return found

    @cached_property
    def depth(self) -> int:
        """Return the largest number of views on a cell."""
        return max(map(len, self.covers))

    def divisible(self, factor: int) -> bool:
        """Return whether the views fall on whole cells of a grid `factor` times coarser."""
        return all(value % factor == 0 for value in (self.extent, self.size, *self.starts))

    def scaled(self, factor: int) -> Axis:
        """Return the same views on a grid `factor` times coarser, as inside a UNet."""
        if not self.divisible(factor):
            raise ValueError(f"views {self.starts} of {self.size} in {self.extent} are not multiples of {factor}")
        return Axis(self.extent // factor, self.size // factor, tuple(start // factor for start in self.starts))


@dataclass(frozen=True)
class Views:
    """A grid of views, rows first: view `i` is (rows.starts[i // X], columns.starts[i % X])."""

    rows: Axis
    columns: Axis

    @property
    def count(self) -> int:
        """Return the number of views."""
        return len(self.rows.starts) * len(self.columns.starts)

    @property
    def middle(self) -> int:
        """Return the index of the view in the middle of the middle row."""
        return len(self.rows.starts) // 2 * len(self.columns.starts) + len(self.columns.starts) // 2

    @property
    def has_middles(self) -> bool:
        """Return whether any cell is covered by a single view."""
        return all(min(map(len, axis.covers)) == 1 for axis in (self.rows, self.columns))

    def scaled(self, factor: int) -> Views:
        """Return the same views on a grid `factor` times coarser."""
        return Views(self.rows.scaled(factor), self.columns.scaled(factor))

    def enlarged(self, factor: int) -> Views:
        """Return the same views on a grid `factor` times finer, as in pixels."""
        return Views(self.rows.enlarged(factor), self.columns.enlarged(factor))

    def divisible(self, factor: int) -> bool:
        """Return whether the views fall on whole cells of a grid `factor` times coarser."""
        return self.rows.divisible(factor) and self.columns.divisible(factor)


@dataclass(frozen=True)
class Layout:
    """The views of each step: `at(step)`."""

    at: Callable[[int], Views]


def shifted_starts(extent: int, size: int, shift: int, loop: bool) -> list[int]:
    """Return the first cells of views side by side, moved by `shift` cells (SpotDiffusion).

    On a loop they wrap around, otherwise the outer views are moved inside.
    """
    if not 0 <= shift < size <= extent:
        raise UserError(f"need 0 <= shift < view size <= canvas, got {shift}, {size}, {extent} (latent cells)")
    if loop:
        return [(shift + start) % extent for start in range(0, extent, size)]
    starts = range(shift - size if shift else 0, extent, size)
    return sorted({min(max(start, 0), extent - size) for start in starts})


def shifts(size: int, stride: int) -> list[int]:
    """Return the multiples of `stride` below `size`, ordered such that consecutive ones are far apart."""
    return sorted(range(0, size, stride), key=lambda shift: f"{shift // stride:032b}"[::-1])


def build_layout(
    layout: str,
    height: int,
    width: int,
    size: int,
    stride: int,
    loop: bool = False,
    merged_steps: int = 0,
    overlap_from: int | None = None,
) -> Layout:
    """Return the views for a canvas of `height` x `width` latent cells.

    `overlapping`: every `stride` cells, the same at each step (MultiDiffusion). `shifted`: side by side, moved at each
    step (SpotDiffusion): by another multiple of `stride` in the first `merged_steps`, whose attention needs whole
    cells of the UNet's coarsest level, then by any number of cells, which leaves no border twice in one place; from
    step `overlap_from` on they overlap as `overlapping` ones.
    `whole`: one view that is the canvas. `loop` wraps views around the vertical edge. Raises UserError when the views
    cannot cover the canvas exactly.
    """
    if layout == "whole":
        whole = Views(Axis(height, height, (0,)), Axis(width, width, (0,)))
        return Layout(lambda step: whole)
    across = tuple(view_starts(width, size, stride, loop))  # raises for impossible sizes
    down = tuple(view_starts(height, size, stride))
    overlapping = Views(Axis(height, size, down), Axis(width, size, across))
    if layout == "overlapping":
        return Layout(lambda step: overlapping)
    if layout == "shifted":
        coarse = [_shifted(height, width, size, shift, loop) for shift in shifts(size, stride)]
        # From the end of the cycle: its beginning is multiples of the stride, where borders have been already.
        fine = [_shifted(height, width, size, shift, loop) for shift in reversed(shifts(size, 1))]

        def at(step: int) -> Views:
            if overlap_from is not None and step >= overlap_from:
                return overlapping
            return coarse[step % len(coarse)] if step < merged_steps else fine[(step - merged_steps) % len(fine)]

        return Layout(at)
    raise UserError(f"method.views.layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")


def _shifted(height: int, width: int, size: int, shift: int, loop: bool) -> Views:
    rows = Axis(height, size, tuple(shifted_starts(height, size, shift if height > size else 0, False)))
    columns = Axis(width, size, tuple(shifted_starts(width, size, shift if loop or width > size else 0, loop)))
    return Views(rows, columns)
