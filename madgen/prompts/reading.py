"""Read the prompts of a job into a table; file formats are modules of `madgen.prompts.readers`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b

import numpy as np
import pyarrow as pa

from madgen.config.schema import PromptsConfig
from madgen.prompts.builder import BATCH_ROWS, TableBuilder
from madgen.prompts.parsing import RowParser
from madgen.prompts.picture_columns import PictureColumns
from madgen.prompts.rows import Defaults
from madgen.prompts.sources import PromptSource, find_sources
from madgen.prompts.table import PromptTable
from madgen.utils.arrow import integer_array
from madgen.utils.errors import UserError


def read_prompts(
    config: PromptsConfig,
    height: int,
    width: int,
    batch_rows: int = BATCH_ROWS,
    key_prefix: str = "",
    pictures: PictureColumns | None = None,
) -> PromptTable:
    """Read all prompts of `config`; rows without a size are `height` x `width` pixels.

    UserErrors name the line. `batch_rows` rows are held in memory at a time; it does not affect the result.
    `key_prefix` is `output.key_prefix`. `pictures`: columns that name pictures; None: no such columns.
    """
    pictures = pictures or PictureColumns()
    sources = find_sources(config, pictures.fields)
    parser = RowParser(config, height, width, pictures)
    defaults = Defaults(config.negative_prompt, height, width, parser.job_regions(sources[0]) or ())
    if config.samples is not None and config.on_duplicate == "error":
        config = replace(config, on_duplicate="rename")  # random combinations may be equal
    builder = TableBuilder(config, defaults, [source.name for source in sources], batch_rows, key_prefix=key_prefix)
    _add_rows(builder, parser, sources)
    table = builder.finish(parser.masks)
    if not len(table):
        raise UserError(f"prompts.source={config.source} contains no prompts; write one per line")
    return _shuffled(table, config, batch_rows) if config.shuffle else table


def _add_rows(builder: TableBuilder, parser: RowParser, sources: Sequence[PromptSource]) -> None:
    """Add the rows of all sources, up to `prompts.limit`."""
    for number, source in enumerate(sources):
        try:
            for chunk in source.read():
                parser.add(builder, source, number, chunk)
                if builder.full:
                    return
        except UserError:
            # Report errors in the order of rows: a duplicate may precede this one, and the limit may end before it.
            builder.flush()
            if builder.full:
                return
            raise
    builder.flush()
    if not builder.full:
        parser.check_kept()


def _shuffled(table: PromptTable, config: PromptsConfig, batch_rows: int) -> PromptTable:
    """Return a table with the same prompts, sorted by a hash of `prompts.seed` and their id.

    So the order in the source does not matter, and a prompt that is added leaves the order of the others as it is.
    """
    header, prefix = table.header, f"{config.seed}/".encode()
    ids = (name for batch in table.batches for name in batch.column("id").to_pylist())
    digests = b"".join(blake2b(prefix + name.encode(), digest_size=8).digest() for name in ids)
    order = np.argsort(np.frombuffer(digests, ">u8"), kind="stable")
    rows = pa.Table.from_batches(table.batches)
    builder = TableBuilder(config, header.defaults, header.sources, batch_rows, key_prefix=header.key_prefix)
    for start in range(0, len(order), batch_rows):
        for batch in rows.take(integer_array(order[start : start + batch_rows])).combine_chunks().to_batches():
            builder.add_batch(batch)
    return builder.finish(((mask, folder) for mask, folder, *_ in header.masks))
