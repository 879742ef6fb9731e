"""Check that the files of a dataset are files, and its folders folders. Links to such are accepted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from madgen.dataset.layout import DatasetDir
from madgen.utils.errors import UserError


def check_kinds(directory: DatasetDir, shards: set[str]) -> None:
    """Raise UserError for a directory, pipe or broken link in place of a file of a dataset, or the other way round.

    `shards`: the planned ones. Nothing is opened.
    """
    root = directory.root
    for folder in (directory.shards, directory.work, root / "samples"):
        if os.path.lexists(folder) and not os.path.isdir(folder):
            raise UserError(f"{folder} is not a directory; move it away, then generate again")
    for path in (root / "index.parquet", root / "README.md", root / "quarantine.jsonl"):
        if os.path.lexists(path) and not os.path.isfile(path):
            raise UserError(f"{path} {_kind(path)}; move it away, then generate again")
    for path in _shard_files_of_other_kinds(directory):
        if path.stem in shards:
            raise UserError(
                f"{path} {_kind(path)}; run madgen verify {root} --repair, then generate again to remake its shard"
            )


def _shard_files_of_other_kinds(directory: DatasetDir) -> Iterator[Path]:
    """Yield what is no file: of finished shards, and tars of unfinished ones that cannot be replaced by one."""
    try:
        entries = {entry.name: entry for entry in os.scandir(directory.shards)}
    except FileNotFoundError:
        return
    for name, entry in sorted(entries.items()):
        path = directory.shards / name
        if path.suffix not in (".tar", ".json") or os.path.isfile(path):
            continue
        if f"{path.stem}.json" in entries or not entry.is_symlink():
            yield path


def _kind(path: Path) -> str:
    return "is a link that leads to no file" if path.is_symlink() else "is not a regular file"
