"""All prompts of a plan: an Arrow table in record batches, of which only the pages in use have to be in memory."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from madgen.prompts.digests import offsets_of
from madgen.prompts.rows import SCHEMA, Defaults, decode, place_name
from madgen.prompts.totals import Totals
from madgen.types import Prompt, Region
from madgen.utils.atomic import atomic
from madgen.utils.errors import UserError

FORMAT = 3
HEADER = b"madgen"
PIECE = 4096  # rows that are Python objects at a time while iterating


@dataclass(frozen=True)
class Header:
    """What is known of a table as a whole."""

    defaults: Defaults
    samples_per_prompt: int
    """Of `keys_digest`."""
    sources: list[str]
    totals: Totals
    prompts_digest: str
    """32 hex digits over everything of the prompts that affects pixels, see `madgen.prompts.digests.PromptsDigest`."""
    keys_digest: str
    """sha256 over every planned key, one a line, in order."""
    masks: list[list[Any]]
    """The mask files that lines name, see `madgen.prompts.regions.mask_stamp`."""


class PromptTable(Sequence[Prompt]):
    """A sequence of Prompts that is made of them when asked for. Immutable; made by `TableBuilder`, `of` or `open`."""

    def __init__(self, batches: list[pa.RecordBatch], header: Header):
        self._batches, self.header = batches, header
        self._starts = [0, *accumulate(map(len, batches))]

    @classmethod
    def of(cls, prompts: Iterable[Prompt], samples_per_prompt: int = 1) -> PromptTable:
        """A table of Prompts that were made otherwise."""
        from madgen.prompts.builder import TableBuilder

        builder = TableBuilder(Defaults("", 0, 0), samples_per_prompt=samples_per_prompt, sources=["prompts"])
        for line, prompt in enumerate(prompts, 1):
            builder.add(prompt, 0, line)
        return builder.finish()

    def __len__(self) -> int:
        return self._starts[-1]

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
        for start in range(0, len(self), PIECE):
            yield from self._read(start, min(start + PIECE, len(self)))

    def _read(self, start: int, stop: int) -> list[Prompt]:
        prompts: list[Prompt] = []
        while start < stop:
            number = bisect_right(self._starts, start) - 1
            first, last = self._starts[number], min(stop, self._starts[number + 1])
            piece = self._batches[number].slice(start - first, last - start)
            ids, texts, own, regions = (piece.column(name).to_pylist() for name in ("id", "text", "own", "regions"))
            rows = zip(ids, texts, own, regions, strict=True)
            prompts += [decode(*row, defaults=self.header.defaults) for row in rows]
            start = last
        return prompts

    def where(self, row: int) -> str:
        """`file:line` of a row."""
        number = bisect_right(self._starts, row) - 1
        batch, at = self._batches[number], row - self._starts[number]
        return place_name(batch.column("place")[at].as_py(), batch.column("id")[at].as_py(), self.header.sources)

    def rows_with_regions(self) -> Iterator[int]:
        """Rows in order; of those that have the job's regions only the first of each size."""
        shared = set(self.header.totals.first_rows.values()) if self.header.defaults.regions else set()
        for start, batch in zip(self._starts, self._batches, strict=False):
            column = batch.column("regions")
            own = [] if column.null_count == len(batch) else np.flatnonzero(column.is_valid().to_numpy(False)).tolist()
            here = {row for row in shared if start <= row < start + len(batch)}
            yield from (row for row in sorted({start + at for at in own} | here) if row in here or self[row].regions)

    def rows_of_their_own(self) -> Iterator[int]:
        """Rows in order that say more than a prompt and an id."""
        for start, batch in zip(self._starts, self._batches, strict=False):
            own, regions = (batch.column(name).is_valid().to_numpy(False) for name in ("own", "regions"))
            yield from (start + np.flatnonzero(own | regions)).tolist()

    def rows_longer_than(self, size: int) -> Iterator[int]:
        """Rows in order whose texts may be longer than `size` bytes of UTF-8: its prompt, or what else it says."""
        for start, batch in zip(self._starts, self._batches, strict=False):
            yield from (start + np.flatnonzero(text_sizes(batch) > size)).tolist()

    def save(self, path: Path) -> None:
        """Writes an Arrow IPC file; under its final name it is complete. Raises OSError."""
        schema = SCHEMA.with_metadata({HEADER: json.dumps(_header_to_json(self.header, len(self))).encode()})
        with atomic(path) as stream, pa.ipc.new_file(stream, schema) as writer:
            for batch in self._batches:
                writer.write_batch(batch)

    @classmethod
    def open(cls, path: Path) -> PromptTable:
        """A saved table, mapped into memory; UserError if the file is not there, or not whole."""
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            content = json.loads((reader.schema.metadata or {})[HEADER])
            batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
            header = _header_from_json(content)
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no whole table of prompts ({error}); remove it") from error
        if content["format"] != FORMAT or content["rows"] != sum(map(len, batches)):
            raise UserError(f"{path} is no whole table of prompts of this version; remove it")
        return cls(batches, header)


def text_sizes(batch: pa.RecordBatch) -> np.ndarray:
    """UTF-8 bytes [rows] of a prompt, or of all else that its line says if that is more."""
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
    return Header(**{**fields, "totals": Totals.from_json(content["totals"])})
