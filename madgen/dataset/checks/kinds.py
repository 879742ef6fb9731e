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
        if os.path.lexists(folder) and not _is_kind(folder, is_folder=True):
            raise UserError(f"{folder} is not a directory; move it away, then generate again")
    for path in (root / "index.parquet", root / "README.md", root / "quarantine.jsonl"):
        if os.path.lexists(path) and not _is_kind(path):
            raise UserError(f"{path} {_kind(path)}; move it away, then generate again")
    for name in _shards_of_other_kinds(directory):
        if name in shards:
            path = next(path for path in (directory.sidecar(name), directory.tar(name)) if not _is_kind(path))
            raise UserError(
                f"{path} {_kind(path)}; run madgen verify {root} --repair, then generate again to remake its shard"
            )


def _shards_of_other_kinds(directory: DatasetDir) -> Iterator[str]:
    """Yield finished shards of which a file is none, and unfinished ones whose tar cannot be replaced by one."""
    try:
        entries = {entry.name: entry for entry in os.scandir(directory.shards)}
    except FileNotFoundError:
        return
    for name, entry in sorted(entries.items()):
        stem, _, suffix = name.rpartition(".")
        if suffix not in ("tar", "json") or _is_kind(directory.shards / name):
            continue
        if f"{stem}.json" in entries or not entry.is_symlink():
            yield stem


def _is_kind(path: Path, is_folder: bool = False) -> bool:
    return os.path.isdir(path) if is_folder else os.path.isfile(path)


def _kind(path: Path) -> str:
    return "is a link that leads to no file" if path.is_symlink() else "is not a regular file"
