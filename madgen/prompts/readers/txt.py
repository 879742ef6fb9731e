"""Plain text: one prompt per line; empty lines and surrounding whitespace are ignored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from madgen.prompts.readers import Chunk
from madgen.prompts.readers._lines import read_blocks

COLUMNS, GZIP = False, True


def read(path: Path, columns: Mapping[str, str]) -> Iterator[Chunk]:
    """Read the prompts of a `.txt`."""
    for first, lines in read_blocks(path):
        rows = list(map(str.strip, lines))
        numbers = range(first, first + len(rows))
        if all(rows):
            yield Chunk(numbers, rows)
        else:
            yield Chunk([number for number, row in zip(numbers, rows, strict=True) if row], list(filter(None, rows)))
