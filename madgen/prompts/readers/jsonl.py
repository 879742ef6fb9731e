"""JSON Lines: one object per line, with `prompt` and optional further fields."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from madgen.prompts.readers import Chunk
from madgen.prompts.readers._json import flat_pairs, load
from madgen.prompts.readers._lines import read_blocks
from madgen.utils.errors import UserError

COLUMNS, GZIP = True, True


def read(path: Path, columns: Mapping[str, str]) -> Iterator[Chunk]:
    """Read the objects of a `.jsonl`; with `columns`, other keys are ignored."""
    for first, lines in read_blocks(path):
        numbers: list[int] = []
        rows: list[str | dict[str, Any]] = []
        try:
            for number, line in enumerate(map(str.strip, lines), first):
                if line:
                    rows.append(_row(line, path, number, columns))
                    numbers.append(number)
        except UserError:
            yield Chunk(numbers, rows)  # rows before the invalid line
            raise
        yield Chunk(numbers, rows)


def _row(line: str, path: Path, number: int, columns: Mapping[str, str]) -> str | dict[str, Any]:
    pairs = flat_pairs(line)
    if pairs is None:
        fields = load(line, f"{path}:{number}")
        if not isinstance(fields, dict):
            raise UserError(f"{path}:{number} must be a JSON object with the key prompt, got {line[:40]!r}")
    elif not columns and len(pairs) == 1 and pairs[0][0] == "prompt" and type(pairs[0][1]) is str:
        return pairs[0][1]
    else:
        fields = dict(pairs)
    if columns:
        return {field: fields.get(column) for field, column in columns.items()}
    return fields
