"""What `prompts.source` names: a file, files by a pattern, or a Hugging Face dataset."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from madgen.prompts.readers import Chunk, known_suffixes, reader_of
from madgen.prompts.readers._hub import dataset_files, is_hub, read_hub
from madgen.utils.errors import UserError


@dataclass(frozen=True)
class Source:
    """One file, or one dataset."""

    name: str
    """As messages call it."""
    folder: Path
    """That the mask files of its lines are relative to."""
    files: Callable[[], list[Path]]
    """What it is made of, as far as it is on this machine."""
    read: Callable[[], Iterator[Chunk]]


def find_sources(source: str, split: str = "train", columns: Mapping[str, str] | None = None) -> list[Source]:
    """The sources of a job, files in the order of their paths.

    A file of exactly this name wins over a pattern. UserError where there is none, or where `split` (of datasets) or
    `columns` (from our fields to a table's) would have no meaning.
    """
    columns = columns or {}
    if is_hub(source):
        files, read = partial(dataset_files, source), partial(read_hub, source, split, columns)
        files()  # refuses what can be no dataset
        return [Source(source, Path(), files, read)]
    if split != "train":
        raise UserError(f"prompts.split={split} goes with a Hugging Face dataset (hf://...), not with {source}")
    return [_file(path, columns) for path in _paths(source)]


def _paths(source: str) -> list[Path]:
    if os.path.lexists(source):
        return [Path(source)]
    if not glob.has_magic(source):
        raise UserError(f"prompts.source={source} does not exist")
    try:
        found = sorted({Path(path) for path in glob.glob(source, recursive=True) if not os.path.isdir(path)})
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"prompts.source={source} cannot be looked up: {error}") from error
    if not found:
        raise UserError(f"prompts.source={source} does not exist, and matches no file; quote patterns in a shell")
    return found


def _file(path: Path, columns: Mapping[str, str]) -> Source:
    if path.is_dir():
        raise UserError(f"prompts.source={path} is a directory; name a file, or a pattern such as {path}/*.txt")
    reader = reader_of(path)
    if not path.is_file():
        raise UserError(
            f"prompts.source={path} is no regular file; prompts are read from {', '.join(known_suffixes())}"
        )
    if columns and not reader.COLUMNS:
        raise UserError(f"prompts.columns has no meaning with {path}, which has no columns; leave it empty")
    return Source(str(path), path.parent, lambda: [path], partial(reader.read, path, columns))
