"""CSV with a header; fields with empty cells are not set. The delimiter follows from the header."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any, NoReturn

from madgen.prompts.readers import Chunk, PromptFile, ReadOptions, Row, in_chunks
from madgen.prompts.readers._columns import Choice, choose_columns
from madgen.prompts.readers._json import load
from madgen.prompts.readers._lines import read_blocks
from madgen.utils.errors import UserError

COLUMNS, COMMENTS, GZIP = True, False, True
DELIMITERS = (",", ";", "\t", "|")
NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
EXCEL = re.compile(r'"?sep=([,;|:^~\t])"?', re.IGNORECASE)  # line that Excel writes before the header
INTEGER = re.compile(r"([+-]?[0-9]{1,20})(\.0*)?")
NUMBERS = ("width", "height", "seed")
LISTS = ("regions", "across")


def read(file: PromptFile, options: ReadOptions, delimiters: Sequence[str] = DELIMITERS) -> Iterator[Chunk]:
    """Read rows whose delimiter is the first of `delimiters`, or another one if only that fits the header.

    Raises UserError for a row with more or fewer cells than the header.
    """
    lines, skipped, delimiter = _dialect(
        (line for _, lines in read_blocks(file) for line in lines), options, delimiters
    )
    cells = _cells(lines, skipped, delimiter, file)
    header = next(cells, None)
    if header is None:
        return
    choice = choose_columns(str(file), header[1], options)
    yield from in_chunks(_rows(cells, header[1], choice, file, delimiter), bool(choice.extras))


def _dialect(lines: Iterator[str], options: ReadOptions, delimiters: Sequence[str]) -> tuple[Iterator[str], int, str]:
    """Return the lines from the header on, the number of lines before it, and the delimiter."""
    skipped, line = next(((number, line) for number, line in enumerate(lines) if line.strip()), (0, ""))
    if (named := EXCEL.fullmatch(line.rstrip("\r"))) is not None:
        return lines, skipped + 1, named[1]
    required = set(options.columns.values()) or {"prompt"}
    headers = {delimiter: _split(line, delimiter) for delimiter in delimiters}
    fitting = [delimiter for delimiter, names in headers.items() if required <= set(names)]
    if not fitting:  # the error about the missing column lists the most columns
        fitting = [max(delimiters, key=lambda delimiter: len(headers[delimiter]))]
    return chain([line], lines), skipped, delimiters[0] if delimiters[0] in fitting else fitting[0]


def _split(line: str, delimiter: str) -> list[str]:
    with suppress(csv.Error):
        return next(csv.reader([line], delimiter=delimiter, strict=True), [])
    return []


def _cells(lines: Iterator[str], skipped: int, delimiter: str, file: PromptFile) -> Iterator[tuple[int, list[str]]]:
    """Yield (first line, cells) of each row that is not empty."""
    reader = csv.reader((line + "\n" for line in lines), delimiter=delimiter, strict=True)
    last = 0
    try:
        for row in reader:
            if row:
                yield skipped + last + 1, row
            last = reader.line_num
    except csv.Error as error:
        raise UserError(f"{file}:{skipped + last + 1} is not valid CSV: {error}") from error


def _rows(
    cells: Iterator[tuple[int, list[str]]], names: list[str], choice: Choice, file: PromptFile, delimiter: str
) -> Iterator[Row]:
    wanted = [(names.index(column), field) for column, field in choice.fields.items()]
    kept = [(names.index(column), column) for column in choice.extras]
    only = wanted[0][0] if len(wanted) == 1 else None  # the prompt
    width, first = len(names), names[0]
    for number, row in cells:
        if len(row) != width or (row[0] == first and row == names):
            _refuse(row, names, f"{file}:{number}", delimiter)
        extras = {column: row[at] or None for at, column in kept} if kept else None
        if only is not None and row[only]:
            yield number, row[only], extras
        elif any(row):
            yield number, {field: _value(field, row[at], file, number) for at, field in wanted if row[at]}, extras


def _refuse(row: list[str], names: list[str], where: str, delimiter: str) -> NoReturn:
    if row == names:
        raise UserError(f"{where} repeats the header, as in concatenated files; remove the line")
    raise UserError(
        f"{where} has {len(row)} cells, but the header has {len(names)}; "
        f'quote prompts that contain {NAMES.get(delimiter, repr(delimiter))} or quotes: "..."'
    )


def _value(field: str, cell: str, file: PromptFile, number: int) -> Any:
    """Convert a cell as if it were JSON; invalid integers stay strings, which the parser refuses."""
    if field in NUMBERS:
        match = INTEGER.fullmatch(cell.strip())
        return int(match[1]) if match else float("nan") if cell.strip().lower() == "nan" else cell
    return load(cell, f"{file}:{number}: {field}") if field in LISTS else cell
