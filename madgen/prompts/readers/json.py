"""A JSON object `{"0": "prompt", ...}`, as in GPT1k; its keys are the ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

from madgen.prompts.readers import Chunk
from madgen.prompts.readers._json import load
from madgen.prompts.readers._lines import read_text
from madgen.utils.errors import UserError

COLUMNS, GZIP = False, True
ROWS = 8192


def read(path: Path, columns: Mapping[str, str]) -> Iterator[Chunk]:
    """Read the prompts of a `.json`, which is loaded as a whole; use `.jsonl` for large files."""
    table = load(read_text(path), path)
    if not isinstance(table, dict):
        raise UserError(f'{path} must be a JSON object such as {{"0": "a prompt"}}; use .jsonl for one object per line')
    first, items = 1, iter(table.items())
    while pairs := list(islice(items, ROWS)):
        yield Chunk(range(first, first + len(pairs)), [{"id": key, "prompt": value} for key, value in pairs])
        first += len(pairs)
