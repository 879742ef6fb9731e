"""Read the prompts of a job into a table; file formats are modules of `madgen.prompts.readers`."""

from __future__ import annotations

from madgen.config.schema import PromptsConfig
from madgen.prompts.builder import BATCH_ROWS, TableBuilder
from madgen.prompts.parsing import RowParser
from madgen.prompts.rows import Defaults
from madgen.prompts.sources import find_sources
from madgen.prompts.table import PromptTable
from madgen.utils.errors import UserError


def read_prompts(config: PromptsConfig, height: int, width: int, batch_rows: int = BATCH_ROWS) -> PromptTable:
    """Read all prompts of `config`; rows without a size are `height` x `width` pixels.

    UserErrors name the line. `batch_rows` rows are held in memory at a time; it does not affect the result.
    """
    sources = find_sources(config)
    parser = RowParser(config, height, width)
    defaults = Defaults(config.negative_prompt, height, width, parser.job_regions(sources[0]) or ())
    builder = TableBuilder(config, defaults, [source.name for source in sources], batch_rows)
    for number, source in enumerate(sources):
        try:
            for chunk in source.read():
                parser.add(builder, source, number, chunk)
                if builder.full:
                    return builder.finish(parser.masks)
        except UserError:
            # Report errors in the order of rows: a duplicate may precede this one, and the limit may end before it.
            builder.flush()
            if builder.full:
                return builder.finish(parser.masks)
            raise
    table = builder.finish(parser.masks)
    if not len(table):
        raise UserError(f"prompts.source={config.source} contains no prompts; write one per line")
    return table
