"""Tab-separated values with a header; otherwise the same as CSV."""

from __future__ import annotations

from collections.abc import Iterator

from madgen.prompts.readers import Chunk, PromptFile, ReadOptions
from madgen.prompts.readers.csv import read_delimited

COLUMNS, COMMENTS, GZIP = True, False, True


def read(file: PromptFile, options: ReadOptions) -> Iterator[Chunk]:
    """Read the rows of a `.tsv`."""
    yield from read_delimited(file, options, ("\t",))
