"""Build a PromptTable from rows, in batches: resolve duplicates, and compute totals and digests on the way."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from operator import attrgetter
from typing import Any

import numpy as np
import pyarrow as pa

from madgen.config.schema import PromptsConfig
from madgen.prompts.digests import KeysDigest, PromptsDigest, runs
from madgen.prompts.duplicates import FreeNames, IdIndex
from madgen.prompts.picture_files import file_stamp
from madgen.prompts.rows import SCHEMA, Defaults, decode, encode, pack_place, rest_identity, unpack_place
from madgen.prompts.spill import IN_MEMORY, SpillBuffer
from madgen.prompts.table import STORED, Header, PromptTable, text_sizes
from madgen.prompts.totals import PromptTotals
from madgen.types import Prompt
from madgen.utils.arrow import integer_array, string_array
from madgen.utils.errors import UserError

BATCH_ROWS = 32_768
BATCH_BYTES = 32 << 20
SHAPE = attrgetter("height", "width", "negative", "regions")
MAX_PROMPTS = 2**32 - 1


class TableBuilder:
    """Collects rows until it is `full`. Errors are raised in the order of rows, whatever the batch size.

    `sources` are names for messages; rows refer to them by index. `in_memory`: bytes, see `SpillBuffer`.
    """

    def __init__(
        self,
        config: PromptsConfig,
        defaults: Defaults,
        sources: list[str],
        batch_rows: int = BATCH_ROWS,
        in_memory: int = IN_MEMORY,
        key_prefix: str = "",
    ):
        self.key_prefix = key_prefix
        self.config, self.defaults, self.sources, self.batch_rows = config, defaults, sources, batch_rows
        self.rows = 0
        self._buffer = SpillBuffer(in_memory)
        self._index = IdIndex(lambda rows: [self._cell(row, "id") for row in rows])
        self._names = FreeNames(self._index)
        self._totals, self._prompts_digest = PromptTotals(), PromptsDigest()
        self._keys_digest = KeysDigest(config.samples_per_prompt, key_prefix)
        self._starts: list[int] = []
        self._clear()

    def _clear(self) -> None:
        self._ids: list[str] = []
        self._texts: list[str] = []
        self._prompts: list[Prompt | None] = []  # None: the defaults
        self._places: list[int] = []
        self._bytes = 0

    @property
    def full(self) -> bool:
        """Return whether `prompts.limit` is reached."""
        return self.config.limit is not None and self.rows >= self.config.limit

    def add(self, prompt: Prompt, source: int, line: int) -> None:
        """Add a row. Raises UserError for a duplicate, possibly of an earlier row."""
        self._ids.append(prompt.id)
        self._texts.append(prompt.text)
        self._prompts.append(None if self.defaults.match(prompt) else prompt)
        self._places.append(pack_place(source, line))
        self._bytes += len(prompt.text)
        self._flush_if_full()

    def add_texts(self, texts: Sequence[str], ids: Sequence[str] | None, source: int, lines: Sequence[int]) -> None:
        """Add valid rows that consist of a prompt and possibly an id; without `ids`, these are `default_id`."""
        encoded = [text.encode() for text in texts]
        self._ids += [blake2b(text, digest_size=8).hexdigest() for text in encoded] if ids is None else ids
        self._texts += texts
        self._prompts += [None] * len(texts)
        self._places += map(pack_place(source, 0).__add__, lines)
        self._bytes += sum(map(len, encoded))
        self._flush_if_full()

    def add_batch(self, batch: pa.RecordBatch) -> None:
        """Add rows of another table with the same defaults and sources, without duplicates."""
        ids, texts, *rest = (batch.column(name).to_pylist() for name in STORED)
        own = zip(ids, texts, *rest, strict=True)
        prompts = [None if row[2:] == (None, None, None) else decode(self.defaults, *row) for row in own]
        self._commit(ids, texts, prompts, batch.column("place").to_pylist())

    def _flush_if_full(self) -> None:
        limit = self.config.limit
        rows = self.batch_rows if limit is None else min(self.batch_rows, max(limit - self.rows, 1024))
        if len(self._ids) >= rows or self._bytes >= BATCH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the collected rows as a batch. Raises UserError for a duplicate."""
        ids, texts, prompts, places = self._ids, self._texts, self._prompts, self._places
        self._clear()
        kept = self._resolve_duplicates(ids, texts, places)
        if len(kept) < len(ids):
            ids, texts, places = ([column[row] for row in kept] for column in (ids, texts, places))  # type: ignore
            prompts = [prompts[row] for row in kept]
        if ids:
            self._commit(ids, texts, prompts, places)

    def _resolve_duplicates(self, ids: list[str], texts: list[str], places: list[int]) -> Sequence[int]:
        """Return positions of the rows to keep; rename duplicates in `ids`, or raise, as `on_duplicate` requests."""
        policy, limit = self.config.on_duplicate, self.config.limit
        left = len(ids) if limit is None else min(len(ids), limit - self.rows)
        earlier = self._index.find(ids)  # positions to rows of the table
        if not earlier and len(set(ids)) == len(ids):
            return range(left)
        if policy == "rename":
            self._names.look_ahead(ids, earlier)
        positions: dict[str, int] = {}
        for position, identity in enumerate(ids):
            if len(positions) >= left:
                break
            if position in earlier or identity in positions:
                if policy == "skip":
                    continue
                if policy == "error":
                    first = positions.get(identity)
                    origin = self._cell(earlier[position], "place") if first is None else places[first]
                    here, there = (unpack_place(place, identity, self.sources) for place in (places[position], origin))
                    raise UserError(
                        f"{here}: same id as {there}: {identity!r} ({texts[position][:40]!r}), which is made of the "
                        "text if a prompt has no id; set prompts.on_duplicate=skip to keep the first one, or to rename"
                    )
                ids[position] = identity = self._names.free(identity, positions)
            positions[identity] = position
        return list(positions.values())

    def _commit(self, ids: list[str], texts: list[str], prompts: list[Prompt | None], places: list[int]) -> None:
        if self.rows + len(ids) > MAX_PROMPTS:
            raise UserError(f"more than {MAX_PROMPTS} prompts; split them into several datasets, see prompts.limit")
        rest = [pa.nulls(len(ids), pa.string())] * 3
        if any(prompts):
            rows = [(None, None, None) if prompt is None else encode(prompt, self.defaults) for prompt in prompts]
            rest = [string_array(column, pa.string()) for column in zip(*rows, strict=True)]
        strings = string_array(ids, pa.string()), string_array(texts, pa.large_string())
        columns = [*strings, *rest, integer_array(places)]
        batch = pa.record_batch(columns, schema=SCHEMA)
        self._index.add(ids, self.rows)
        self._keys_digest.update(ids)
        self._prompts_digest.update(columns[0], columns[1])
        self._count(prompts)
        lengths = map(np.ndarray.tolist, np.unique_counts(text_sizes(batch)))
        self._totals.lengths.update(dict(zip(*lengths, strict=True)))
        self._starts.append(self.rows)
        self._buffer.append(batch)
        self.rows += len(ids)

    def _count(self, prompts: list[Prompt | None]) -> None:
        """Update totals and digest, one run of equal prompts at a time."""
        default, row = self.defaults.prompt("", ""), self.rows
        default_rest = rest_identity(default)
        self._prompts_digest.update_rests(
            runs(default_rest if prompt is None else rest_identity(prompt) for prompt in prompts)
        )
        for (height, width, negative, regions), count in runs(SHAPE(prompt or default) for prompt in prompts):
            shared = row if regions == self.defaults.regions else None
            self._totals.add((height, width), count, negative, regions, shared)
            row += count

    def _cell(self, row: int, column: str) -> Any:
        number = bisect_right(self._starts, row) - 1
        return self._buffer.batches[number].column(column)[row - self._starts[number]].as_py()

    def finish(self, masks: Iterable[tuple[str, str | None]] = ()) -> PromptTable:
        """Return the table; the builder must not be used afterwards. `masks`: (name, folder) of rows' mask files."""
        if not self.full:
            self.flush()
        digests = self._prompts_digest.hexdigest(), self._keys_digest.hexdigest()
        stamps, each = [file_stamp(*mask) for mask in sorted(masks, key=str)], self.config.samples_per_prompt
        header = Header(self.defaults, each, self.key_prefix, self.sources, self._totals, *digests, stamps)
        return PromptTable(self._buffer.batches, header)
