"""Hash the content of model files and folders; each file is read once on each node."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from functools import lru_cache
from io import BufferedReader
from pathlib import Path

from madgen.utils.node_cache import once


def file_hash(file: Path) -> str:
    """Hash the content of a file."""
    return _file_hash(file, file.stat().st_mtime_ns)


@lru_cache
def _file_hash(file: Path, mtime_ns: int) -> str:
    def read(stream: BufferedReader) -> str:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()

    return once(file, "blake2b, 16 bytes", read)


@lru_cache
def folder_hash(folder: Path) -> str:
    """Hash the names and the content of the weights, configs and tokenizers in a folder and its subfolders."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(_files_below(folder)):
        if path.suffix in (".safetensors", ".json", ".txt") and path.is_file():
            content = once(path, "sha256", lambda stream: hashlib.file_digest(stream, "sha256").hexdigest())
            digest.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder, those of linked folders too; a link to a folder that contains it is not followed."""
    for parent, folders, files in os.walk(folder, followlinks=True):
        above = [Path(parent).resolve(), *Path(parent).resolve().parents]
        folders[:] = [name for name in folders if Path(parent, name).resolve() not in above]
        yield from (Path(parent, name) for name in files)
