"""Read prompt files into rows: one module per format, named after the file suffix.

A module defines `read(file, options) -> Iterator[Chunk]`, which yields all rows before an invalid one and then raises
UserError; COLUMNS, whether it has columns (`prompts.columns`, `prompts.keep_columns`); COMMENTS, whether it supports
`prompts.comments`; and GZIP, whether files may be compressed (`.txt.gz`). Modules whose names start with `_` are shared
helpers.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from madgen.config.schema import PROMPT_FIELDS
from madgen.utils.errors import UserError

ALL = "all"
"""Value of `prompts.keep_columns` that keeps every column."""


@dataclass(frozen=True)
class PromptFile:
    """A file on this machine; messages show its `name`, which may be the URL that it was downloaded from."""

    path: Path
    name: str
    sha256: str | None = None
    """Checksum of a file that was downloaded."""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class ReadOptions:
    """The settings of a job that affect how its sources are read."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """Columns by field (`prompts.columns`); empty if they have the same names."""
    keep: str | Sequence[str] = ()
    """Further columns to keep (`prompts.keep_columns`): names, or `all`."""
    comments: str | None = None
    """Start of the lines to ignore (`prompts.comments`)."""
    fields: tuple[str, ...] = PROMPT_FIELDS
    """Names of the fields of a row."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of a source."""

    lines: Sequence[int]
    """Line of each row, from 1."""
    rows: Sequence[str | dict[str, Any]]
    """Fields of each row (None: not set), or just the prompt, which is much faster for large files."""
    extras: Sequence[dict[str, Any]] | None = None
    """Kept columns of each row; None if there are none."""


ROWS = 8192
"""Rows in a chunk."""
Row = tuple[int, str | dict[str, Any], dict[str, Any] | None]
"""Line, fields and kept columns; see `Chunk`."""


def in_chunks(rows: Iterable[Row], keep: bool, size: int = ROWS) -> Iterator[Chunk]:
    """Collect rows in chunks, with their kept columns if `keep`. Those before an invalid row precede its UserError."""
    numbers: list[int] = []
    fields: list[str | dict[str, Any]] = []
    extras: list[dict[str, Any]] | None = [] if keep else None
    try:
        for number, row, kept in rows:
            numbers.append(number)
            fields.append(row)
            if extras is not None:
                extras.append(kept or {})
            if len(fields) == size:
                yield Chunk(numbers, fields, extras)
                numbers, fields, extras = [], [], [] if keep else None
    except UserError:
        yield Chunk(numbers, fields, extras)
        raise
    yield Chunk(numbers, fields, extras)


class Reader(Protocol):
    """A module of this package."""

    COLUMNS: bool
    COMMENTS: bool
    GZIP: bool

    def read(self, file: PromptFile, options: ReadOptions) -> Iterator[Chunk]:
        """Read the rows of a file."""


def known_suffixes() -> list[str]:
    """Return the suffixes of all formats: `.csv`, `.json`, ..."""
    return sorted(f".{module.name}" for module in pkgutil.iter_modules(__path__) if module.name[0] != "_")


def suffix_of(name: str) -> str:
    """Return the suffix that selects the reader of a file: `.csv` for `a.csv` and `a.csv.gz`."""
    path = Path(name)
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


def reader_of(name: str) -> Reader:
    """Return the module for a file. Raises UserError with the known suffixes if there is none."""
    suffix, compressed = suffix_of(name), name.lower().endswith(".gz")
    if suffix not in known_suffixes():
        known = ", ".join(known_suffixes())
        raise UserError(f"prompts.source={name} must end in {known}, got {suffix + '.gz' * compressed!r}")
    reader: Reader = importlib.import_module(f"{__name__}{suffix}")
    if compressed and not reader.GZIP:
        raise UserError(f"prompts.source={name}: {suffix} files are not read with gzip; decompress the file")
    return reader
