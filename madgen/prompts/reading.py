"""From what `prompts.source` names to a table of Prompts; a file's format is a module of `madgen.prompts.readers`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from madgen.prompts.builder import BATCH_ROWS, TableBuilder, prompt_id
from madgen.prompts.parsing import Lines
from madgen.prompts.rows import Defaults
from madgen.prompts.sources import find_sources
from madgen.prompts.table import PromptTable
from madgen.utils.errors import UserError

__all__ = ["prompt_id", "read_prompts"]


def read_prompts(
    source: str,
    *,
    negative_prompt: str,
    height: int,
    width: int,
    limit: int | None = None,
    on_duplicate: str = "error",
    regions: Sequence[Any] = (),
    across: Sequence[Any] = (),
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    samples_per_prompt: int = 1,
    batch_rows: int = BATCH_ROWS,
) -> PromptTable:
    """The prompts of a file, of files or of a dataset; what a line leaves open takes the given values.

    UserError names the line at fault. `batch_rows` prompts are held in memory at a time, and change nothing else.
    """
    sources = find_sources(source, split, columns)
    lines = Lines(negative_prompt, height, width, list(regions), list(across))
    builder = TableBuilder(
        Defaults(negative_prompt, height, width),
        samples_per_prompt=samples_per_prompt,
        limit=limit,
        on_duplicate=on_duplicate,
        sources=[found.name for found in sources],
        batch_rows=batch_rows,
    )
    for number, found in enumerate(sources):
        try:
            for chunk in found.read():
                lines.add(builder, found, number, chunk)
                if builder.full:
                    return builder.finish()
        except UserError:
            builder.flush()  # a duplicate before the line at fault comes first, and beyond the limit no line is wrong
            if builder.full:
                return builder.finish()
            raise
    table = builder.finish()
    if not len(table):
        raise UserError(f"prompts.source={source} holds no prompt; write one a line")
    return table
