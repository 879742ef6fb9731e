"""Prompt files to rows: one module a format, named after the suffix that it reads.

A module has `read(path, columns) -> Iterator[Chunk]`, which yields what stands before a line at fault before it raises
UserError, and COLUMNS, whether `prompts.columns` has a meaning for it. Modules whose names begin with `_` are what
these share. A file may be packed (`.gz` behind its suffix) where the module says so with GZIP.
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
    """Some consecutive rows of a source: few enough to be held, many enough to be worth a step."""

    lines: Sequence[int]
    """Where each row stands, from 1."""
    rows: Sequence[str | dict[str, Any]]
    """A text where a row is only a prompt (the short cut that makes ten million of them bearable), else its fields;
    a field that is None is not given."""


class Reader(Protocol):
    """A module of this folder."""

    COLUMNS: bool
    GZIP: bool

    def read(self, path: Path, columns: Mapping[str, str]) -> Iterator[Chunk]:
        """The rows of a file; `columns` maps our fields to the file's, empty: they are called as ours."""


def known_suffixes() -> list[str]:
    """`.csv`, `.json`, ...: a module each."""
    return sorted(f".{module.name}" for module in pkgutil.iter_modules(__path__) if module.name[0] != "_")


def reader_of(path: Path) -> Reader:
    """The module that reads a file; UserError names the known suffixes."""
    packed = path.suffix.lower() == ".gz"
    suffix = (path.with_suffix("") if packed else path).suffix.lower()
    if suffix not in known_suffixes():
        known = ", ".join(known_suffixes())
        raise UserError(f"prompts.source={path} must end in {known}, got {suffix + '.gz' * packed!r}")
    reader: Reader = importlib.import_module(f"{__name__}{suffix}")
    if packed and not reader.GZIP:
        raise UserError(f"prompts.source={path}: {suffix} is packed in itself; unpack it with gunzip")
    return reader
