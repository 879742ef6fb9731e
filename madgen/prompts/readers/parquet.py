"""Parquet; fields with nulls are not set."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from madgen.prompts.readers import Chunk, PromptFile, ReadOptions
from madgen.prompts.readers._arrow import READ_ERRORS, arrow_chunks, rows_at_once
from madgen.prompts.readers._columns import choose_columns
from madgen.utils.errors import UserError

COLUMNS, COMMENTS, GZIP = True, False, False
BUFFER = 1 << 20  # bytes to read ahead per column; without it, whole row groups are held in memory


def read(file: PromptFile, options: ReadOptions) -> Iterator[Chunk]:
    """Read the rows of a `.parquet`."""
    try:
        with open(file.path, "rb") as stream:
            table = pq.ParquetFile(stream, buffer_size=BUFFER)
            choice = choose_columns(str(file), table.schema_arrow.names, options)
            yield from arrow_chunks(str(file), _batches(table, choice.columns, rows_at_once(choice)), choice)
    except UserError:
        raise
    except READ_ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None:  # those of pyarrow for invalid content have none
            raise UserError(f"cannot read prompts.source={file}: {error.strerror}") from error
        raise UserError(f"{file} is not a complete Parquet file ({error}); copy it again") from error


def _batches(table: pq.ParquetFile, columns: list[str], rows: int) -> Iterator[pa.RecordBatch]:
    for group in range(table.num_row_groups):
        yield from table.iter_batches(rows, [group], columns=columns)
