"""Convert Arrow tables to rows, for Parquet files and Hugging Face datasets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa

from madgen.config.schema import PICTURE_FIELDS
from madgen.prompts.readers import Chunk
from madgen.prompts.readers._columns import Choice
from madgen.utils.errors import UserError

ROWS, ROWS_WITH_PICTURES = 16_384, 64
"""Rows in memory at a time; cells may be pictures of megabytes."""
READ_ERRORS = (pa.ArrowException, OSError, ValueError, OverflowError)
"""Exceptions of pyarrow for data that it cannot read, or that have no Python equivalent."""


def arrow_chunks(name: str, tables: Iterable[pa.Table | pa.RecordBatch], choice: Choice) -> Iterator[Chunk]:
    """Yield a chunk per table. Raises UserError for unreadable values."""
    first = 1
    try:
        for table in tables:
            rows = _rows(table, choice)
            extras = table.select(list(choice.extras)).to_pylist() if choice.extras else None
            yield Chunk(range(first, first + len(rows)), rows, extras)
            first += len(rows)
    except READ_ERRORS as error:
        raise UserError(f"{name} cannot be read after row {first - 1}: {error}") from error


def rows_at_once(choice: Choice) -> int:
    """Return the number of rows to read at a time."""
    return ROWS_WITH_PICTURES if PICTURE_FIELDS.keys() & set(choice.fields.values()) else ROWS


def _rows(table: pa.Table | pa.RecordBatch, choice: Choice) -> list[str | dict[str, Any]]:
    values = [table.column(column).to_pylist() for column in choice.fields]
    names = list(choice.fields.values())
    if names == ["prompt"]:
        return [value if type(value) is str else {"prompt": value} for value in values[0]]
    return [dict(zip(names, row, strict=True)) for row in zip(*values, strict=True)]
