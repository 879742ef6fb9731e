"""Pictures without a file on this machine, those of URLs and of table cells: cached by their content.

The cache may be deleted: pictures of URLs are downloaded again, others are read again when the job is planned.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from madgen.utils.atomic import write_atomically
from madgen.utils.credentials import mask_urls
from madgen.utils.errors import UserError
from madgen.utils.filesystems import WEB, check_client_installed, errors_of, file_system, protocol_of

MAX_BYTES = 1 << 29
"""Size of the largest picture file: more than `Image.MAX_IMAGE_PIXELS` pixels without compression."""
VERSIONS = ("ETag", "etag", "ETAG", "mtime", "LastModified", "last_modified", "created", "blob_id", "Content-MD5")
"""Fields of a file system's information that change with the content of a file."""


def cache_folder() -> Path:
    """Return the folder of cached pictures: `madgen/pictures` in `XDG_CACHE_HOME`, by default `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "madgen" / "pictures"


def is_url(name: str) -> bool:
    """Return whether a name of a picture is a URL."""
    return "://" in name


def store(content: bytes) -> Path:
    """Cache a picture; return its file. Raises UserError if the cache cannot be written."""
    path = _file_of(hashlib.sha256(content).hexdigest())
    try:
        if not path.exists() or path.stat().st_size != len(content):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content)
    except OSError as error:
        raise UserError(
            f"cannot cache a picture in {cache_folder()}: {error.strerror}; set XDG_CACHE_HOME to another folder"
        ) from error
    return path


def cached(sha256: str) -> bytes | None:
    """Return a cached picture; None if it is missing or damaged."""
    try:
        content = _file_of(sha256).read_bytes()
    except OSError:
        return None
    return content if hashlib.sha256(content).hexdigest() == sha256 else None


def download(url: str) -> bytes:
    """Return the content of a URL, from the cache unless it has changed. Raises UserError."""
    name = mask_urls(url)
    check_client_installed("picture", url)
    with errors_of(name):
        fs, root = file_system(url)
        info = fs.info(root)
        if info.get("type") == "directory":
            raise UserError(f"{name} is a folder; name a picture in it")
        if (info.get("size") or 0) > MAX_BYTES:
            raise _too_large(name)
        pointer = _pointer(url, info)
        content = None if pointer is None else _pointed(pointer)
        if content is None:
            with fs.open(root, "rb", **({"block_size": 0} if protocol_of(url) in WEB else {})) as stream:
                content = _limited(stream, name)
            if pointer is not None:
                store(content)
                write_atomically(pointer, hashlib.sha256(content).hexdigest().encode())
        return content


def _limited(stream: BinaryIO, name: str) -> bytes:
    """Read a stream to its end, which may be endless, whatever its size is claimed to be."""
    parts, size = [], 0
    while part := stream.read(1 << 20):
        parts.append(part)
        size += len(part)
        if size > MAX_BYTES:
            raise _too_large(name)
    return b"".join(parts)


def _too_large(name: str) -> UserError:
    return UserError(f"{name} has more than {MAX_BYTES >> 20} MiB; save the picture with compression")


def _pointer(url: str, info: dict[str, Any]) -> Path | None:
    """Return the file that names the content of this version of a URL; None if its version is not known."""
    version = {name: info[name] for name in VERSIONS if info.get(name)}
    if not version:
        return None
    state = json.dumps([url, info.get("size"), version], default=str, sort_keys=True)
    return cache_folder() / "urls" / hashlib.blake2b(state.encode(), digest_size=16).hexdigest()


def _pointed(pointer: Path) -> bytes | None:
    try:
        return cached(pointer.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _file_of(sha256: str) -> Path:
    return cache_folder() / sha256[:2] / sha256


def content_of(url: str, sha256: str) -> bytes:
    """Return the picture of a URL as it was planned. Raises UserError if it has changed since."""
    content = cached(sha256) or download(url)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(
            f"the picture {mask_urls(url)} has changed since the job was planned; restore it, or start a new dataset"
        )
    store(content)
    return content
