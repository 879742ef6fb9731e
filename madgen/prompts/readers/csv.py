"""A table with a header, cells separated by commas and quoted with ""; an empty cell is not given."""

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
WHOLE = re.compile(r"[+-]?[0-9]{1,20}")
NUMBERS = ("width", "height", "seed")
LISTS = ("regions", "across")


def read(path: Path, columns: Mapping[str, str]) -> Iterator[Chunk]:
    """The rows of a `.csv`; UserError for a row with more or fewer cells than the header."""
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
                    f"{path}:{number} has {len(row)} cells, the header {len(header[1])}; "
                    'put a prompt with commas or quotes in "..."'
                )
            if only is not None and row[only]:
                rows.append(row[only])
            else:
                rows.append({ours: _value(ours, row[index], path, number) for index, ours in wanted if row[index]})
            numbers.append(number)
            if len(rows) == ROWS:
                yield Chunk(numbers, rows)
                numbers, rows = [], []
    except UserError:
        yield Chunk(numbers, rows)
        raise
    yield Chunk(numbers, rows)


def _cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(its first line, cells) of each row that is not empty."""
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
    """A cell as the JSON that it would be; what is no whole number stays a text, which is refused later."""
    if field in NUMBERS and WHOLE.fullmatch(cell):
        return int(cell)
    return load(cell, f"{path}:{number}: {field}") if field in LISTS else cell
