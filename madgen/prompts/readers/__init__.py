"""Read prompt files into rows: one module per format, named after the file suffix.

A module defines `read(path, columns) -> Iterator[Chunk]`, which yields all rows before an invalid one and then raises
UserError; COLUMNS, whether it supports `prompts.columns`; and GZIP, whether files may be compressed (`.txt.gz`).
Modules whose names start with `_` are shared helpers.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from madgen.utils.errors import UserError


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of a source."""

    lines: Sequence[int]
    """Line of each row, from 1."""
    rows: Sequence[str | dict[str, Any]]
    """Fields of each row (None: not set), or just the prompt, which is much faster for large files."""


class Reader(Protocol):
    """A module of this package."""

    COLUMNS: bool
    GZIP: bool

    def read(self, path: Path, columns: Mapping[str, str]) -> Iterator[Chunk]:
        """Read the rows of a file; `columns` maps fields to columns of the file, empty if they have the same names."""


def known_suffixes() -> list[str]:
    """Return the suffixes of all formats: `.csv`, `.json`, ..."""
    return sorted(f".{module.name}" for module in pkgutil.iter_modules(__path__) if module.name[0] != "_")


def reader_of(path: Path) -> Reader:
    """Return the module for a file. Raises UserError with the known suffixes if there is none."""
    compressed = path.suffix.lower() == ".gz"
    suffix = (path.with_suffix("") if compressed else path).suffix.lower()
    if suffix not in known_suffixes():
        known = ", ".join(known_suffixes())
        raise UserError(f"prompts.source={path} must end in {known}, got {suffix + '.gz' * compressed!r}")
    reader: Reader = importlib.import_module(f"{__name__}{suffix}")
    if compressed and not reader.GZIP:
        raise UserError(f"prompts.source={path}: {suffix} files are not read with gzip; decompress the file")
    return reader
