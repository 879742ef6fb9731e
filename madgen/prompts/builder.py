"""Builds a PromptTable: rows in, batch by batch, duplicates found, totals and digests taken on the way."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b
from itertools import groupby
from operator import attrgetter
from typing import Any

import numpy as np
import pyarrow as pa

from madgen.prompts.digests import KeysDigest, PromptsDigest
from madgen.prompts.duplicates import FreeNames, IdIndex
from madgen.prompts.pending import Pending
from madgen.prompts.regions import mask_stamp
from madgen.prompts.rows import SCHEMA, Defaults, place_name, place_of, rest_identity
from madgen.prompts.spill import IN_MEMORY, Spool
from madgen.prompts.table import Header, PromptTable, text_sizes
from madgen.prompts.totals import Totals
from madgen.types import Prompt, Region
from madgen.utils.errors import UserError

BATCH_ROWS = 32_768
BATCH_BYTES = 32 << 20
SHAPE = attrgetter("height", "width", "negative", "regions")
MOST_PROMPTS = 2**32 - 1


def prompt_id(text: str) -> str:
    """The id of a prompt that has none: 16 hex digits of its hash."""
    return blake2b(text.encode(), digest_size=8).hexdigest()


class TableBuilder:
    """Takes rows until it is `full`; what is wrong with a row is told in the order of rows, batch size or not."""

    def __init__(
        self,
        defaults: Defaults,
        *,
        samples_per_prompt: int = 1,
        limit: int | None = None,
        on_duplicate: str = "error",
        sources: list[str],
        batch_rows: int = BATCH_ROWS,
        in_memory: int = IN_MEMORY,
    ):
        self.defaults, self.samples_per_prompt = defaults, samples_per_prompt
        self.limit, self.on_duplicate, self.sources, self.batch_rows = limit, on_duplicate, sources, batch_rows
        self.masks: set[tuple[str, str]] = set()
        """(name, folder) of the mask files that lines name."""
        self.rows = 0
        self._pending, self._spool, self._index = Pending(), Spool(in_memory), IdIndex(self._ids_at)
        self._totals, self._prompts, self._keys = Totals(), PromptsDigest(), KeysDigest(samples_per_prompt)
        self._starts: list[int] = []
        self._names = FreeNames(self._index)

    @property
    def full(self) -> bool:
        """Whether `limit` is reached."""
        return self.limit is not None and self.rows >= self.limit

    def add(self, prompt: Prompt, source: int, line: int) -> None:
        """One row. UserError for a duplicate, which may be an earlier row."""
        pending = self._pending
        pending.ids.append(prompt.id)
        pending.texts.append(prompt.text)
        pending.own.append(None if self.defaults.are_all_of(prompt) else prompt)
        pending.places.append(place_of(source, line))
        pending.bytes += len(prompt.text)
        self._flush_if_many()

    def add_texts(self, texts: Sequence[str], ids: Sequence[str] | None, source: int, lines: Sequence[int]) -> None:
        """Rows that are only a prompt and maybe an id, and known to be good ones."""
        pending = self._pending
        encoded = [text.encode() for text in texts]
        pending.ids += [blake2b(text, digest_size=8).hexdigest() for text in encoded] if ids is None else ids
        pending.texts += texts
        pending.own += [None] * len(texts)
        first = place_of(source, 0)
        pending.places += map(first.__add__, lines)
        pending.bytes += sum(map(len, encoded))
        self._flush_if_many()

    def _flush_if_many(self) -> None:
        pending = self._pending
        wanted = self.batch_rows if self.limit is None else min(self.batch_rows, max(self.limit - self.rows, 1024))
        if len(pending.ids) >= wanted or pending.bytes >= BATCH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Makes a batch of what is pending; UserError for a duplicate."""
        pending, self._pending = self._pending, Pending()
        earlier = self._index.find(pending.ids)
        if earlier or len(set(pending.ids)) < len(pending.ids):
            self._resolve(pending, earlier)
        elif self.limit is not None:
            pending.keep(range(min(len(pending.ids), self.limit - self.rows)))
        if pending.ids:
            self._commit(pending)

    def _resolve(self, pending: Pending, earlier: dict[int, int]) -> None:
        """Does with duplicates as `on_duplicate` says; `earlier`: rows of the ids that are in the table already."""
        if self.on_duplicate == "rename":
            self._names.look_ahead(pending.ids, earlier)
        here: dict[str, int] = {}
        kept: list[int] = []
        for position, identity in enumerate(pending.ids):
            if self.limit is not None and self.rows + len(kept) >= self.limit:
                break
            if position in earlier or identity in here:
                if self.on_duplicate == "skip":
                    continue
                if self.on_duplicate == "error":
                    origin = here.get(identity)
                    place = self._place(earlier[position]) if origin is None else pending.places[origin]
                    self._refuse(identity, pending.texts[position], pending.places[position], place)
                pending.ids[position] = identity = self._names.free(identity, here)
            here[identity] = position
            kept.append(position)
        pending.keep(kept)

    def _refuse(self, identity: str, text: str, place: int, origin: int) -> None:
        here, there = (place_name(where, identity, self.sources) for where in (place, origin))
        raise UserError(
            f"{here}: the same id as {there}: {identity!r} ({text[:40]!r}); set prompts.on_duplicate to skip or rename"
        )

    def _commit(self, pending: Pending) -> None:
        if self.rows + len(pending.ids) > MOST_PROMPTS:
            raise UserError(f"more than {MOST_PROMPTS} prompts; make several datasets of them, see prompts.limit")
        own, regions = pending.own_columns(self.defaults)
        ids, texts = pa.array(pending.ids, pa.string()), pa.array(pending.texts, pa.large_string())
        batch = pa.record_batch([ids, texts, own, regions, pa.array(pending.places, pa.int64())], schema=SCHEMA)
        self._index.add(pending.ids, self.rows)
        self._keys.update(pending.ids)
        self._prompts.update(ids, texts)
        self._count(pending)
        self._totals.lengths.update(
            dict(zip(*map(np.ndarray.tolist, np.unique_counts(text_sizes(batch))), strict=True))
        )
        self._starts.append(self.rows)
        self._spool.append(batch)
        self.rows += len(pending.ids)

    def _count(self, pending: Pending) -> None:
        """Totals and what is left of the digest, a run of usual prompts at a time."""
        usual, row = self.defaults.prompt("", ""), self.rows
        usual_rest = rest_identity(usual)
        rests = (usual_rest if prompt is None else rest_identity(prompt) for prompt in pending.own)
        self._prompts.update_rests([(rest, sum(1 for _ in run)) for rest, run in groupby(rests)])
        for (height, width, negative, regions), run in groupby((prompt or usual for prompt in pending.own), SHAPE):
            count = sum(1 for _ in run)
            shared = row if regions == self.defaults.regions else None
            self._totals.add((height, width), count, negative, regions, shared)
            row += count

    def use_regions(self, regions: tuple[Region, ...]) -> None:
        """The job's own regions, known when the first row is."""
        assert not self.rows
        assert not self._pending.ids
        self.defaults = replace(self.defaults, regions=regions)

    def _ids_at(self, rows: Sequence[int]) -> list[str]:
        return [self._cell(row, "id") for row in rows]

    def _place(self, row: int) -> int:
        return self._cell(row, "place")

    def _cell(self, row: int, column: str) -> Any:
        number = bisect_right(self._starts, row) - 1
        return self._spool.batches[number].column(column)[row - self._starts[number]].as_py()

    def finish(self) -> PromptTable:
        """The table; nothing can be added after it."""
        if not self.full:
            self.flush()
        header = Header(
            self.defaults,
            self.samples_per_prompt,
            self.sources,
            self._totals,
            self._prompts.hexdigest(),
            self._keys.hexdigest(),
            sorted(mask_stamp(*mask) for mask in self.masks),
        )
        return PromptTable(self._spool.batches, header)
