"""Square crops that cover a panorama."""

from __future__ import annotations


def covering_squares(height: int, width: int, size: int) -> list[list[int]]:
    """Return squares [left, top, right, bottom] side by side; the last of a row or column ends at the border.

    >>> covering_squares(4, 10, 4)
    [[0, 0, 4, 4], [4, 0, 8, 4], [6, 0, 10, 4]]
    """
    rows, columns = min(size, height), min(size, width)
    return [
        [left, top, left + columns, top + rows] for top in _starts(height, rows) for left in _starts(width, columns)
    ]


def _starts(extent: int, size: int) -> list[int]:
    return [min(start, extent - size) for start in range(0, extent, size)]
