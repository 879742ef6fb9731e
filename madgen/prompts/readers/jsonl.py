"""JSON Lines: one object per line, with `prompt` and optional further fields."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from madgen.prompts.readers import Chunk, PromptFile, ReadOptions, Row, in_chunks
from madgen.prompts.readers._columns import split_keys
from madgen.prompts.readers._json import flat_pairs, load
from madgen.prompts.readers._lines import read_blocks
from madgen.utils.errors import UserError

COLUMNS, COMMENTS, GZIP = True, False, True


def read(file: PromptFile, options: ReadOptions) -> Iterator[Chunk]:
    """Read the objects of a `.jsonl`; with `columns`, other keys are ignored."""
    yield from in_chunks(_rows(file, options), bool(options.keep))


def _rows(file: PromptFile, options: ReadOptions) -> Iterator[Row]:
    plain = not options.columns and not options.keep
    for first, lines in read_blocks(file):
        for number, line in enumerate(map(str.strip, lines), first):
            if line:
                row = _row(line, file, number, plain)
                yield (number, row, None) if plain or isinstance(row, str) else (number, *split_keys(row, options))


def _row(line: str, file: PromptFile, number: int, plain: bool) -> str | dict[str, Any]:
    """Parse a line; return just the prompt of an object without other keys if `plain`."""
    pairs = flat_pairs(line)
    if pairs is None:
        fields = load(line, f"{file}:{number}")
        if not isinstance(fields, dict):
            raise UserError(f"{file}:{number} must be a JSON object with the key prompt, got {line[:40]!r}")
        return fields
    if plain and len(pairs) == 1 and pairs[0][0] == "prompt" and type(pairs[0][1]) is str:
        return pairs[0][1]
    return dict(pairs)
