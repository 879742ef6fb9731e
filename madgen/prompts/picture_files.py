"""Files that prompts name, masks of regions and pictures: where they may be, and what identifies them.

A prompt file from elsewhere could otherwise publish any picture of this machine. So files must be inside the folder of
their prompt file, unless `prompts.allow_masks_outside` is true.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from madgen.images.pictures import decode_picture, read_file, upright
from madgen.types import PictureFile
from madgen.utils.errors import UserError
from madgen.utils.validation import expand_user


@dataclass(frozen=True)
class TarMember:
    """A picture in a tar file, in place of the name of a file."""

    tar: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"at byte {self.offset} of {self.tar}"


def find_file(where: object, kind: str, name: str, folder: Path | None, confined: bool) -> Path:
    """Return the path of a file, relative to `folder`, or else to the current directory; links are resolved.

    `where` (the row) and `kind` are for messages. If `confined`, files must be inside `folder`, or there are none if it
    is None. Raises UserError.
    """
    path = _find(f"{where}: {kind}", name, folder)
    if path is None:
        raise UserError(f"{where}: {kind} file {name} exists neither in {folder} nor in the current directory")
    if confined and (folder is None or not path.is_relative_to(folder.resolve())):
        place = "the folder of the prompt file" if folder is not None else "a dataset of the Hub, which has no folder"
        raise UserError(
            f"{where}: {kind} file {name} is outside {place}; only if you trust the source, set "
            "prompts.allow_masks_outside=true: masks are published in the dataset, and pictures can be seen in it"
        )
    return path


def parse_picture(where: object, kind: str, name: Any, folder: Path | None, confined: bool) -> PictureFile:
    """Return the picture that a row names in the column `kind`, decoded once to check it. Raises UserError."""
    if isinstance(name, TarMember):
        path, span = Path(name.tar), (name.offset, name.size)
    elif isinstance(name, str) and name.strip():
        path, span = find_file(where, kind, name, folder, confined), None
    else:
        raise UserError(f"{where}: {kind} must be the name of a picture file, got {name!r:.80}")
    try:
        status = path.stat()
        return _examined(kind, str(path), span, (status.st_mtime_ns, status.st_ctime_ns))
    except OSError as error:
        raise UserError(f"{where}: cannot read the {kind} {name}: {error.strerror}") from error
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


@lru_cache(maxsize=4096)
def _examined(kind: str, path: str, span: tuple[int, int] | None, times: tuple[int, int]) -> PictureFile:
    """Return checksum and size of a picture, cached by the times of its file."""
    content = read_file(path, span)
    name = path if span is None else str(TarMember(path, *span))
    image = upright(decode_picture(content, kind, name))
    return PictureFile(path, hashlib.sha256(content).hexdigest(), image.height, image.width, span)


def file_sha256(kind: str, path: Path) -> str:
    """Return the checksum of a file, cached by its times. Raises UserError."""
    status = path.stat()
    return _sha256(kind, path, status.st_mtime_ns, status.st_ctime_ns)


@lru_cache(maxsize=4096)
def _sha256(kind: str, path: Path, mtime_ns: int, ctime_ns: int) -> str:
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read the {kind} {path}: {error.strerror}") from error


def file_stamp(name: str, folder: str | None) -> list[Any]:
    """Return [name, folder, path, size, mtime, ctime], which changes with the file that the name resolves to."""
    path = _find("a file", name, None if folder is None else Path(folder))
    status = path.stat() if path is not None else None
    times = (None, None, None) if status is None else (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return [name, folder, str(path), *times]


def _find(key: str, name: str, folder: Path | None) -> Path | None:
    path = expand_user(name, key)
    candidates = (path,) if folder is None else (folder / name, path)
    return next((candidate.resolve() for candidate in candidates if _is_regular(candidate)), None)


def _is_regular(path: str | Path) -> bool:
    """Return whether a path names a regular file with content; files of /proc have a size of 0, and may never end."""
    return os.path.isfile(path) and os.path.getsize(path) > 0
