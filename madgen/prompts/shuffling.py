"""Shuffle a prompt table, by a permutation that depends on the seed and the ids alone."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import pyarrow as pa

from madgen.config.schema import PromptsConfig
from madgen.prompts.builder import TableBuilder
from madgen.prompts.table import PromptTable
from madgen.utils.arrow import integer_array


def shuffled(table: PromptTable, config: PromptsConfig, batch_rows: int) -> PromptTable:
    """Return a table with the same prompts in random order.

    Prompts are sorted by a hash of `prompts.seed` and their id, so the order in the source does not matter, and a
    prompt that is added leaves the order of the others as it is.
    """
    header = table.header
    ranks = np.concatenate([_ranks(batch.column("id"), config.seed) for batch in table.batches])
    order = np.argsort(ranks, kind="stable")
    rows = pa.Table.from_batches(table.batches)
    builder = TableBuilder(config, header.defaults, header.sources, batch_rows, key_prefix=header.key_prefix)
    for start in range(0, len(order), batch_rows):
        for batch in rows.take(integer_array(order[start : start + batch_rows])).combine_chunks().to_batches():
            builder.add_batch(batch)
    return builder.finish(((mask, folder) for mask, folder, *_ in header.masks))


def _ranks(ids: pa.Array, seed: int) -> np.ndarray:
    prefix = f"{seed}/".encode()
    digests = b"".join(blake2b(prefix + name.encode(), digest_size=8).digest() for name in ids.to_pylist())
    return np.frombuffer(digests, ">u8")
