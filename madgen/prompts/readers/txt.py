"""Plain text: one prompt per line; empty lines and surrounding whitespace are ignored."""

from __future__ import annotations

from collections.abc import Iterator

from madgen.prompts.readers import Chunk, PromptFile, ReadOptions
from madgen.prompts.readers._lines import read_blocks

COLUMNS, COMMENTS, GZIP = False, True, True


def read(file: PromptFile, options: ReadOptions) -> Iterator[Chunk]:
    """Read the prompts of a `.txt`."""
    comments = options.comments
    for first, lines in read_blocks(file):
        rows = list(map(str.strip, lines))
        if comments is not None:
            rows = ["" if row.startswith(comments) else row for row in rows]
        numbers = range(first, first + len(rows))
        if all(rows):
            yield Chunk(numbers, rows)
        else:
            yield Chunk([number for number, row in zip(numbers, rows, strict=True) if row], list(filter(None, rows)))
