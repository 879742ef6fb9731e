"""Where record batches lie while a table grows: in memory while they are few, else in a file without a name."""

from __future__ import annotations

import mmap
import tempfile
from typing import IO

import pyarrow as pa

IN_MEMORY = 16 << 20  # bytes


class Spool:
    """A growing list of record batches. What is in the file costs no memory but the pages that are looked at."""

    def __init__(self, in_memory: int = IN_MEMORY):
        self.batches: list[pa.RecordBatch] = []
        self._left = in_memory
        self._file: IO[bytes] | None = None
        self._end = 0

    def append(self, batch: pa.RecordBatch) -> None:
        """Raises OSError if the disk is full."""
        self._left -= batch.nbytes
        if self._left >= 0:
            self.batches.append(batch)
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="madgen-prompts-")  # noqa: SIM115
            self.batches = [self._spill(held) for held in self.batches]
        self.batches.append(self._spill(batch))

    def _spill(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        assert self._file is not None
        message = batch.serialize()
        self._file.write(message)
        padding = -message.size % mmap.ALLOCATIONGRANULARITY  # a map begins at a whole page
        self._file.write(bytes(padding))
        self._file.flush()
        mapped = mmap.mmap(self._file.fileno(), message.size, access=mmap.ACCESS_READ, offset=self._end)
        self._end += message.size + padding
        return pa.ipc.read_record_batch(pa.py_buffer(mapped), batch.schema)
