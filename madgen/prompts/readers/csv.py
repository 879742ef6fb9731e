"""CSV with a header; fields with empty cells are not set."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from madgen.prompts.readers import Chunk
from madgen.prompts.readers._columns import choose_columns
from madgen.prompts.readers._json import load
from madgen.prompts.readers._lines import read_blocks
from madgen.utils.errors import UserError

COLUMNS, GZIP = True, True
ROWS = 8192
INTEGER = re.compile(r"[+-]?[0-9]{1,20}")
NUMBERS = ("width", "height", "seed")
LISTS = ("regions", "across")


def read(path: Path, columns: Mapping[str, str]) -> Iterator[Chunk]:
    """Read the rows of a `.csv`. Raises UserError for a row with more or fewer cells than the header."""
    cells = _cells(path)
    header = next(cells, None)
    if header is None:
        return
    fields = choose_columns(str(path), header[1], columns)
    wanted = [(index, fields[column]) for index, column in enumerate(header[1]) if column in fields]
    only = wanted[0][0] if len(wanted) == 1 else None  # the prompt
    numbers: list[int] = []
    rows: list[str | dict[str, Any]] = []
    try:
        for number, row in cells:
            if len(row) != len(header[1]):
                raise UserError(
                    f"{path}:{number} has {len(row)} cells, but the header has {len(header[1])}; "
                    'quote prompts that contain commas or quotes: "..."'
                )
            if only is not None and row[only]:
                rows.append(row[only])
            else:
                rows.append({field: _value(field, row[index], path, number) for index, field in wanted if row[index]})
            numbers.append(number)
            if len(rows) == ROWS:
                yield Chunk(numbers, rows)
                numbers, rows = [], []
    except UserError:
        yield Chunk(numbers, rows)
        raise
    yield Chunk(numbers, rows)


def _cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (first line, cells) of each row that is not empty."""
    reader = csv.reader((line + "\n" for _, lines in read_blocks(path) for line in lines), strict=True)
    last = 0
    try:
        for row in reader:
            if row:
                yield last + 1, row
            last = reader.line_num
    except csv.Error as error:
        raise UserError(f"{path}:{last + 1} is not valid CSV: {error}") from error


def _value(field: str, cell: str, path: Path, number: int) -> Any:
    """Convert a cell as if it were JSON; invalid integers stay strings, which the parser refuses."""
    if field in NUMBERS and INTEGER.fullmatch(cell):
        return int(cell)
    return load(cell, f"{path}:{number}: {field}") if field in LISTS else cell
