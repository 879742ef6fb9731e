"""All prompts of a plan as Arrow record batches, memory-mapped when loaded from disk."""

from __future__ import annotations

import hashlib
import heapq
import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
from pyarrow.compute import is_in

from madgen.prompts.digests import PromptsDigest, offsets_of, runs
from madgen.prompts.rows import SCHEMA, Defaults, decode, rest_identity, unpack_place
from madgen.prompts.totals import PromptTotals
from madgen.types import Prompt, Region
from madgen.utils.arrow import booleans, integer_array, validity
from madgen.utils.atomic import atomic
from madgen.utils.errors import UserError

FORMAT = 5
CHECKSUM = "sha256"
HEADER = b"madgen"
STORED = ("id", "text", "own", "regions", "columns")
CHUNK_ROWS = 4096  # rows decoded at a time while iterating
Rows = range | np.ndarray
"""Rows of a table, in ascending order."""


@dataclass(frozen=True)
class Header:
    """Properties of a whole table."""

    defaults: Defaults
    samples_per_prompt: int
    """Number of samples of each prompt, as counted in `keys_digest`."""
    key_prefix: str
    """Start of every key in `keys_digest`."""
    sources: list[str]
    """Names of sources, for messages."""
    totals: PromptTotals
    prompts_digest: str
    """32 hex digits over everything that affects pixels, see `madgen.prompts.digests.PromptsDigest`."""
    keys_digest: str
    """See `madgen.prompts.digests.KeysDigest`."""
    masks: list[list[Any]]
    """Mask files in rows, see `madgen.prompts.picture_files.file_stamp`."""


class PromptTable(Sequence[Prompt]):
    """Immutable sequence of Prompts that are decoded on access; see `madgen.prompts.builder` and `open`."""

    def __init__(self, batches: list[pa.RecordBatch], header: Header):
        self.batches, self.header = batches, header
        *self.starts, self._rows = accumulate(map(len, batches), initial=0)

    def __len__(self) -> int:
        return self._rows

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        rows = range(len(self))[index]
        if isinstance(rows, int):
            return self._read(rows, rows + 1)[0]
        if rows.step == 1:
            return self._read(rows.start, rows.stop)
        return [self._read(row, row + 1)[0] for row in rows]

    def __iter__(self) -> Iterator[Prompt]:
        for start in range(0, len(self), CHUNK_ROWS):
            yield from self._read(start, min(start + CHUNK_ROWS, len(self)))

    def _read(self, start: int, stop: int) -> list[Prompt]:
        prompts: list[Prompt] = []
        while start < stop:
            batch, at = self._find(start)
            piece = batch.slice(at, stop - start)
            prompts += self._decode(piece)
            start += len(piece)
        return prompts

    def _find(self, row: int) -> tuple[pa.RecordBatch, int]:
        """Return the batch of a row and its position there."""
        number = bisect_right(self.starts, row) - 1
        return self.batches[number], row - self.starts[number]

    def _decode(self, batch: pa.RecordBatch) -> list[Prompt]:
        rows = zip(*(batch.column(name).to_pylist() for name in STORED), strict=True)
        return [decode(self.header.defaults, *row) for row in rows]

    def location(self, row: int) -> str:
        """Return `file:line` of a row."""
        batch, at = self._find(row)
        place, identity = batch.column("place")[at].as_py(), batch.column("id")[at].as_py()
        return str(unpack_place(place, identity, self.header.sources))

    def rows_with_regions(self) -> Iterator[int]:
        """Yield rows with regions, in order; of those with the job's own regions only the first of each size."""
        sizes = self.header.totals.sizes.values() if self.header.defaults.regions else ()
        shared = sorted(totals.first_row for totals in sizes if totals.first_row is not None)
        others = self.rows_where(lambda batch: validity(batch.column("regions")))
        return heapq.merge(shared, (row for row in others if self[row].regions))

    def rows_where(self, condition: Callable[[pa.RecordBatch], np.ndarray]) -> Iterator[int]:
        """Yield the rows for which a condition holds, in order; it is computed for all rows of a batch."""
        for start, batch in zip(self.starts, self.batches, strict=True):
            yield from (start + np.flatnonzero(condition(batch))).tolist()

    def rows_with_overrides(self) -> Iterator[int]:
        """Yield rows that set more than a prompt and an id, in order."""
        return self.rows_where(lambda batch: validity(batch.column("own")) | validity(batch.column("regions")))

    def rows_longer_than(self, size: int) -> Iterator[int]:
        """Yield rows in order whose prompt or other fields are longer than `size` bytes, see `text_sizes`."""
        return self.rows_where(lambda batch: text_sizes(batch) > size)

    def rows_with_ids(self, ids: pa.Array) -> np.ndarray:
        """Return the rows whose id is one of `ids`."""
        return np.fromiter(self.rows_where(lambda batch: booleans(is_in(batch.column("id"), value_set=ids))), np.int64)

    def _subset(self, rows: Rows) -> Iterator[pa.RecordBatch]:
        """Yield these rows as record batches, none of them empty."""
        chosen = np.asarray(rows, dtype=np.int64)
        for start, batch in zip(self.starts, self.batches, strict=True):
            first, last = np.searchsorted(chosen, [start, start + len(batch)])
            if last - first == len(batch):
                yield batch
            elif last > first:
                yield batch.take(integer_array(chosen[first:last] - start))

    def subset_ids(self, rows: Rows) -> Iterator[list[str]]:
        """Yield the ids of these rows, in chunks."""
        for batch in self._subset(rows):
            yield batch.column("id").to_pylist()

    def subset_digest(self, rows: Rows) -> str:
        """Return the digest of a table of these rows alone."""
        digest, usual = PromptsDigest(), rest_identity(self.header.defaults.prompt("", ""))
        for batch in self._subset(rows):
            digest.update(batch.column("id"), batch.column("text"))
            if all(batch.column(name).null_count == len(batch) for name in STORED[2:]):
                digest.update_rests([(usual, len(batch))])
            else:
                digest.update_rests(runs(map(rest_identity, self._decode(batch))))
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write an Arrow IPC file followed by its checksum, atomically. Raises OSError."""
        schema = SCHEMA.with_metadata({HEADER: json.dumps(_header_to_json(self.header, len(self))).encode()})
        with atomic(path) as stream:
            with pa.ipc.new_file(stream, schema) as writer:
                for batch in self.batches:
                    writer.write_batch(batch)
            stream.flush()
            with open(stream.name, "rb") as written:
                stream.write(hashlib.file_digest(written, CHECKSUM).digest())

    @classmethod
    def open(cls, path: Path) -> PromptTable:
        """Load a saved table by memory mapping. Raises UserError if the file is missing or damaged."""
        try:
            reader = pa.ipc.open_file(_checked(path))
            content = json.loads((reader.schema.metadata or {})[HEADER])
            batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
            header = _header_from_json(content)
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is missing or damaged ({error}); remove it") from error
        if content["format"] != FORMAT or content["rows"] != sum(map(len, batches)):
            raise UserError(f"{path} is damaged, or of another version; remove it")
        return cls(batches, header)


def _checked(path: Path) -> pa.BufferReader:
    """Return the mapped content of a saved table. Raises ValueError if its checksum differs."""
    with pa.memory_map(str(path)) as mapped:
        content = mapped.read_buffer()
    body = content.slice(0, max(0, content.size - hashlib.new(CHECKSUM).digest_size))
    if hashlib.new(CHECKSUM, body).digest() != content.slice(body.size).to_pybytes():
        raise ValueError("checksum mismatch")
    return pa.BufferReader(body)


def text_sizes(batch: pa.RecordBatch) -> np.ndarray:
    """Return the size of each row in UTF-8 bytes: that of the prompt, or of its other fields if larger."""
    sizes = np.diff(offsets_of(batch.column("text")))
    for name in ("own", "regions"):
        if batch.column(name).null_count < len(batch):
            sizes = np.maximum(sizes, np.diff(offsets_of(batch.column(name))))
    return sizes


def _header_to_json(header: Header, rows: int) -> dict[str, Any]:
    defaults = {**vars(header.defaults), "regions": [region.as_dict() for region in header.defaults.regions]}
    totals = header.totals.to_json()
    return {**vars(header), "format": FORMAT, "rows": rows, "defaults": defaults, "totals": totals}


def _header_from_json(content: dict[str, Any]) -> Header:
    fields = {name: content[name] for name in Header.__dataclass_fields__}
    defaults = content["defaults"]
    regions = tuple(Region.from_dict(region) for region in defaults["regions"])
    fields["defaults"] = Defaults(**{**defaults, "regions": regions})
    return Header(**{**fields, "totals": PromptTotals.from_json(content["totals"])})
