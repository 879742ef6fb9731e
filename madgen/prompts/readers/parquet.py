"""Parquet; fields with nulls are not set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from madgen.prompts.readers import Chunk
from madgen.prompts.readers._arrow import READ_ERRORS, ROWS, arrow_chunks
from madgen.prompts.readers._columns import choose_columns
from madgen.utils.errors import UserError

COLUMNS, GZIP = True, False
BUFFER = 1 << 20  # bytes to read ahead per column; without it, whole row groups are held in memory


def read(path: Path, columns: Mapping[str, str]) -> Iterator[Chunk]:
    """Read the rows of a `.parquet`."""
    try:
        with open(path, "rb") as stream:
            file = pq.ParquetFile(stream, buffer_size=BUFFER)
            fields = choose_columns(str(path), file.schema_arrow.names, columns)
            yield from arrow_chunks(str(path), _batches(file, list(fields)), fields)
    except OSError as error:
        if error.errno is None:  # raised by pyarrow for invalid content
            raise UserError(f"{path} is not a complete Parquet file ({error}); copy it again") from error
        raise UserError(f"cannot read prompts.source={path}: {error.strerror}") from error
    except READ_ERRORS as error:
        raise UserError(f"{path} is not a complete Parquet file ({error}); copy it again") from error


def _batches(file: pq.ParquetFile, columns: list[str]) -> Iterator[pa.RecordBatch]:
    for group in range(file.num_row_groups):
        yield from file.iter_batches(ROWS, [group], columns=columns)
