"""JSON Lines: one object per line, with `prompt` and optional further fields."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from madgen.prompts.readers import Chunk, PromptFile, ReadOptions
from madgen.prompts.readers._columns import split_keys
from madgen.prompts.readers._json import flat_pairs, load
from madgen.prompts.readers._lines import read_blocks
from madgen.utils.errors import UserError

COLUMNS, COMMENTS, GZIP = True, False, True


def read(file: PromptFile, options: ReadOptions) -> Iterator[Chunk]:
    """Read the objects of a `.jsonl`; with `columns`, other keys are ignored."""
    plain = not options.columns and not options.keep
    for first, lines in read_blocks(file):
        numbers: list[int] = []
        rows: list[str | dict[str, Any]] = []
        extras: list[dict[str, Any]] | None = [] if options.keep else None
        try:
            for number, line in enumerate(map(str.strip, lines), first):
                if not line:
                    continue
                row = _row(line, file, number, plain)
                if not plain and isinstance(row, dict):
                    row, kept = split_keys(row, options)
                    if extras is not None:
                        extras.append(kept or {})
                rows.append(row)
                numbers.append(number)
        except UserError:
            yield Chunk(numbers, rows, extras)  # rows before the invalid line
            raise
        yield Chunk(numbers, rows, extras)


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
