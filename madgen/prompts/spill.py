"""Record batches of a growing table: in memory while they are few, then in an unnamed temporary file."""

from __future__ import annotations

import mmap
import tempfile
from typing import IO

import pyarrow as pa

IN_MEMORY = 16 << 20  # bytes


class SpillBuffer:
    """A growing list of record batches; beyond `in_memory` bytes, batches are mapped from a temporary file."""

    def __init__(self, in_memory: int = IN_MEMORY):
        self.batches: list[pa.RecordBatch] = []
        self._left = in_memory
        self._file: IO[bytes] | None = None
        self._end = 0

    def append(self, batch: pa.RecordBatch) -> None:
        """Append a batch. Raises OSError if the disk is full."""
        self._left -= batch.nbytes
        if self._left >= 0:
            self.batches.append(batch)
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="madgen-prompts-")  # noqa: SIM115
            self.batches = [self._spill(earlier) for earlier in self.batches]
        self.batches.append(self._spill(batch))

    def _spill(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        assert self._file is not None
        message = batch.serialize()
        self._file.write(message)
        padding = -message.size % mmap.ALLOCATIONGRANULARITY  # a mapping starts at a page boundary
        self._file.write(bytes(padding))
        self._file.flush()
        mapped = mmap.mmap(self._file.fileno(), message.size, access=mmap.ACCESS_READ, offset=self._end)
        self._end += message.size + padding
        return pa.ipc.read_record_batch(pa.py_buffer(mapped), batch.schema)
