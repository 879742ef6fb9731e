"""Convert Arrow tables to rows, for Parquet files and Hugging Face datasets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa

from madgen.prompts.readers import Chunk
from madgen.utils.errors import UserError

ROWS = 16_384
READ_ERRORS = (pa.ArrowException, OSError, ValueError, OverflowError)
"""Exceptions of pyarrow for data that it cannot read, or that have no Python equivalent."""


def arrow_chunks(name: str, tables: Iterable[pa.Table | pa.RecordBatch], fields: Mapping[str, str]) -> Iterator[Chunk]:
    """Yield a chunk per table; `fields` maps columns to fields. Raises UserError for unreadable values."""
    first = 1
    iterator = iter(tables)
    while True:
        try:
            table = next(iterator, None)
            if table is None:
                return
            rows = _rows(table.select(list(fields)), fields)
        except READ_ERRORS as error:
            raise UserError(f"{name} cannot be read after row {first - 1}: {error}") from error
        yield Chunk(range(first, first + len(rows)), rows)
        first += len(rows)


def _rows(table: pa.Table | pa.RecordBatch, fields: Mapping[str, str]) -> list[str | dict[str, Any]]:
    values = [table.column(column).to_pylist() for column in fields]
    names = list(fields.values())
    if names == ["prompt"]:
        return [value if type(value) is str else {"prompt": value} for value in values[0]]
    return [dict(zip(names, row, strict=True)) for row in zip(*values, strict=True)]
