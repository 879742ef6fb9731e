"""Files that prompts name, masks of regions and pictures: where they may be, and what identifies them.

A prompt file from elsewhere could otherwise publish any picture of this machine. So files must be inside the folder of
their prompt file, unless `prompts.allow_masks_outside` is true.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from madgen.images.decoding import decode_picture, read_file, upright
from madgen.images.picture_cache import download, is_url, store
from madgen.types import PictureFile
from madgen.utils.credentials import mask_urls
from madgen.utils.errors import UserError
from madgen.utils.validation import expand_user

CONNECTIONS = 16
"""Pictures that are downloaded at once."""


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
        raise UserError(f"{where}: {kind} file {_printable(name)} {_absence(name, folder)}")
    if confined and (folder is None or not path.is_relative_to(folder.resolve())):
        place = "the folder of the prompt file" if folder is not None else "a dataset of the Hub, which has no folder"
        raise UserError(
            f"{where}: {kind} file {name} is outside {place}; only if you trust the source, set "
            "prompts.allow_masks_outside=true: masks are published in the dataset, and pictures can be seen in it"
        )
    return path


@dataclass(frozen=True)
class Access:
    """Where the files and URLs may be that a source of prompts names."""

    folder: Path | None
    """Folder that files are relative to; None: the current directory."""
    confined: bool = True
    """Files must be inside of it, or there are none if it is None."""
    urls: Sequence[str] | None = ()
    """URLs, or their beginnings (`prompts.allow_picture_urls`); None: any."""
    prompt_file: str | None = None
    """URL of the prompt file, whose names are relative to it."""

    def check_url(self, where: object, kind: str, url: str) -> None:
        """Raise UserError for a URL that may not be read."""
        try:
            parts = urlsplit(url)
            host = parts.hostname or ""
            plain = parts.scheme != "file" and ".." not in unquote(unquote(parts.path)).split("/")
        except ValueError:  # such as brackets around no IPv6 address
            plain = False
        if not plain or "::" in url or "\\" in url or not url.isprintable():
            raise UserError(
                f"{where}: {kind} {mask_urls(_printable(url))} is not a plain URL; name files by their path"
            )
        if self.urls is None or any(url == start or url.startswith(start.rstrip("/") + "/") for start in self.urls):
            return
        raise UserError(
            f"{where}: {kind} {mask_urls(url)} is a URL, and none is read unless the job allows it; set "
            f"prompts.allow_picture_urls=[{parts.scheme}://{host}/] if you trust the source"
        )


ANYWHERE = Access(None, confined=False, urls=None)
"""For names that users pass themselves."""


def parse_picture(where: object, kind: str, name: Any, access: Access) -> PictureFile:
    """Return the picture that a row names in the column `kind`, or contains, decoded once to check it.

    `name`: a path, a URL, the content, a place in a tar file, or a cell of a datasets Image column. Raises UserError.
    """
    name = _cell(name)
    try:
        if isinstance(name, bytes):
            return _of_content(kind, name)
        if isinstance(name, str) and (is_url(name) or access.prompt_file is not None):
            return _of_url(kind, _url(where, kind, name, access))
        if isinstance(name, TarMember):
            path, span = Path(name.tar), (name.offset, name.size)
        elif isinstance(name, str) and name.strip():
            path, span = find_file(where, kind, name, access.folder, access.confined), None
        else:
            raise UserError(f"{kind} must be the name of a picture file, got {name!r:.80}")
        return _examined(kind, str(path), span, _times(path))
    except OSError as error:
        raise UserError(f"{where}: cannot read the {kind} {name}: {error.strerror}") from error
    except UserError as error:
        message = str(error)
        raise UserError(message if message.startswith(f"{where}: ") else f"{where}: {message}") from error


def _cell(value: Any) -> Any:
    """Return the content or the path in a cell of a datasets Image column; other values as they are."""
    if not isinstance(value, Mapping) or not set(value) <= {"bytes", "path"}:
        return value
    content = value.get("bytes")
    return value.get("path") if content is None else content if isinstance(content, bytes) else value


def named_file(name: Any) -> str | None:
    """Return the name of a file that a field names; None if it contains a picture, or names a URL."""
    name = _cell(name)
    return name if isinstance(name, str) and not is_url(name) else None


def _url(where: object, kind: str, name: str, access: Access) -> str:
    if not is_url(name):
        return url_beside(where, kind, name, access.prompt_file or "")
    access.check_url(where, kind, name)
    return name


def url_beside(where: object, kind: str, name: str, prompt_file: str) -> str:
    """Return the URL of a file in the folder of a prompt file at a URL. Raises UserError for other paths."""
    base, path = prompt_file.rpartition("/")[0], posixpath.normpath(name)
    if "://" in name or "\\" in name or path.startswith(("/", "..", "~")):
        raise UserError(f"{where}: {kind} {name!r} must be a path relative to {base}, and inside of it")
    return f"{base}/{path}"


@lru_cache(maxsize=4096)
def _of_url(kind: str, url: str) -> PictureFile:
    """Return a picture at a URL, downloaded once per process."""
    content = download(url)
    picture = _decoded(kind, mask_urls(url), url, content)
    store(content)
    return picture


def prefetch(names: Iterable[tuple[str, Any]], access: Access) -> None:
    """Download the pictures at URLs among (column, name) at once; their errors are raised by `parse_picture`."""
    wanted = set()
    for kind, name in names:
        with suppress(UserError):
            if isinstance(name, str) and (is_url(name) or access.prompt_file is not None):
                wanted.add((kind, _url("", kind, name, access)))
    if len(wanted) > 1:
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            for picture in wanted:
                pool.submit(_of_url, *picture)  # without its result, there are no errors


def _of_content(kind: str, content: bytes) -> PictureFile:
    """Return a picture whose content is in its row, in the cache."""
    return replace(_decoded(kind, "in its row", "", content), path=str(store(content)))


@lru_cache(maxsize=4096)
def _examined(kind: str, path: str, span: tuple[int, int] | None, times: tuple[int, int]) -> PictureFile:
    """Return checksum and size of a picture, cached by the times of its file."""
    name = path if span is None else str(TarMember(path, *span))
    return replace(_decoded(kind, name, path, read_file(path, span)), span=span)


def _decoded(kind: str, name: str, path: str, content: bytes) -> PictureFile:
    """Return checksum and size, upright, of a picture that can be decoded completely; `name` is for messages."""
    image = upright(decode_picture(content, kind, name))
    return PictureFile(path, hashlib.sha256(content).hexdigest(), image.height, image.width)


def file_sha256(kind: str, path: Path) -> str:
    """Return the checksum of a file, cached by its times. Raises UserError."""
    return _sha256(kind, path, _times(path))


def _times(path: Path) -> tuple[int, int]:
    """Return the times in ns of the last modification and of the last change, which cannot be set back."""
    status = path.stat()
    return status.st_mtime_ns, status.st_ctime_ns


@lru_cache(maxsize=4096)
def _sha256(kind: str, path: Path, times: tuple[int, int]) -> str:
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read the {kind} {path}: {error.strerror}") from error


def file_stamp(name: str, folder: str | None) -> list[Any]:
    """Return [name, folder, path, size, mtime, ctime], which changes with the file that the name resolves to."""
    path = _find("a file", name, None if folder is None else Path(folder))
    times = (None, None, None) if path is None else (path.stat().st_size, *_times(path))
    return [name, folder, str(path), *times]


def _find(key: str, name: str, folder: Path | None) -> Path | None:
    path = expand_user(name, key)
    for candidate in (path,) if folder is None else (folder / name, path):
        # files of /proc are regular, but have a size of 0 and may never end
        if os.path.isfile(candidate) and os.path.getsize(candidate) > 0:
            return candidate.resolve()
    return None


def _printable(name: str) -> str:
    """Return a name for messages of one line."""
    return name if name.isprintable() else repr(name)


def _absence(name: str, folder: Path | None) -> str:
    """Say why a name is not that of a file with content."""
    paths = [path for path in (*(() if folder is None else (folder / name,)), Path(name)) if os.path.lexists(path)]
    if not paths:
        is_here = folder is None or folder.resolve() == Path.cwd()
        return "does not exist" if is_here else f"exists neither in {folder} nor in the current directory"
    if not paths[0].exists():
        return "is a broken link"
    if paths[0].is_dir():
        return "is a directory; name a picture in it"
    return "is empty" if paths[0].is_file() else "is not a regular file"
