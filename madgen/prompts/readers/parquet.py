"""A Parquet file; a null is not given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from madgen.prompts.readers import Chunk
from madgen.prompts.readers._arrow import FAULTS, ROWS, arrow_chunks
from madgen.prompts.readers._columns import choose_columns
from madgen.utils.errors import UserError

COLUMNS, GZIP = True, False
BUFFER = 1 << 20  # bytes read ahead a column; without it a whole row group is held


def read(path: Path, columns: Mapping[str, str]) -> Iterator[Chunk]:
    """The rows of a `.parquet`."""
    try:
        with open(path, "rb") as stream:
            file = pq.ParquetFile(stream, buffer_size=BUFFER)
            fields = choose_columns(str(path), file.schema_arrow.names, columns)
            yield from arrow_chunks(str(path), _batches(file, list(fields)), fields)
    except OSError as error:
        if error.errno is None:  # pyarrow's own, about the content
            raise UserError(f"{path} is no whole Parquet file: {error}") from error
        raise UserError(f"cannot read prompts.source={path}: {error.strerror}") from error
    except FAULTS as error:
        raise UserError(f"{path} is no whole Parquet file: {error}") from error


def _batches(file: pq.ParquetFile, columns: list[str]) -> Iterator[pa.RecordBatch]:
    for group in range(file.num_row_groups):
        yield from file.iter_batches(ROWS, [group], columns=columns)
