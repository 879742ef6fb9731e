"""Some rows of a prompt table: their digest, their ids, and the rows that have given ids."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import numpy as np
import pyarrow as pa
import pyarrow.compute as compute

from madgen.prompts.digests import PromptsDigest
from madgen.prompts.rows import decode, rest_identity
from madgen.prompts.table import STORED, PromptTable
from madgen.utils.arrow import booleans, integer_array

Rows = range | np.ndarray
"""Rows of a table, in ascending order."""


def subset_digest(table: PromptTable, rows: Rows) -> str:
    """Return the digest of a table of these rows alone."""
    digest, defaults = PromptsDigest(), table.header.defaults
    usual = rest_identity(defaults.prompt("", ""))
    for batch in _batches(table, rows):
        digest.update(batch.column("id"), batch.column("text"))
        own = [batch.column(name) for name in STORED[2:]]
        if all(column.null_count == len(batch) for column in own):
            digest.update_rests([(usual, len(batch))])
            continue
        stored = zip(*(batch.column(name).to_pylist() for name in STORED), strict=True)
        rests = (rest_identity(decode(defaults, *row)) for row in stored)
        digest.update_rests([(rest, sum(1 for _ in run)) for rest, run in groupby(rests)])
    return digest.hexdigest()


def subset_ids(table: PromptTable, rows: Rows) -> Iterator[list[str]]:
    """Yield the ids of these rows, in chunks."""
    for batch in _batches(table, rows):
        yield batch.column("id").to_pylist()


def rows_with_ids(table: PromptTable, ids: pa.Array) -> np.ndarray:
    """Return the rows whose id is one of `ids`."""
    rows = table.rows_where(lambda batch: booleans(compute.is_in(batch.column("id"), value_set=ids)))
    return np.fromiter(rows, np.int64)


def _batches(table: PromptTable, rows: Rows) -> Iterator[pa.RecordBatch]:
    """Yield the rows as record batches, none of them empty."""
    chosen, start = np.asarray(rows, dtype=np.int64), 0
    for batch in table.batches:
        first, last = np.searchsorted(chosen, [start, start + len(batch)])
        if last - first == len(batch):
            yield batch
        elif last > first:
            yield batch.take(integer_array(chosen[first:last] - start))
        start += len(batch)
