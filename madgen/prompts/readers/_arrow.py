"""Rows of Arrow tables, for Parquet files and Hugging Face datasets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa

from madgen.prompts.readers import Chunk
from madgen.utils.errors import UserError

ROWS = 16_384
FAULTS = (pa.ArrowException, OSError, ValueError, OverflowError)
"""What pyarrow raises for data that it cannot read, or Python cannot hold."""


def arrow_chunks(name: str, tables: Iterable[pa.Table | pa.RecordBatch], fields: Mapping[str, str]) -> Iterator[Chunk]:
    """A chunk a table; `fields`: our field of each column that is read. UserError for values that cannot be read."""
    first = 1
    pulled = iter(tables)
    while True:
        try:
            table = next(pulled, None)
            if table is None:
                return
            rows = _rows(table.select(list(fields)), fields)
        except FAULTS as error:
            raise UserError(f"{name} cannot be read from row {first} on: {error}") from error
        yield Chunk(range(first, first + len(rows)), rows)
        first += len(rows)


def _rows(table: pa.Table | pa.RecordBatch, fields: Mapping[str, str]) -> list[str | dict[str, Any]]:
    values = [table.column(column).to_pylist() for column in fields]
    names = list(fields.values())
    if names == ["prompt"]:
        return [value if type(value) is str else {"prompt": value} for value in values[0]]
    return [dict(zip(names, row, strict=True)) for row in zip(*values, strict=True)]
