"""Pictures without a file on this machine, those of URLs and of table cells: cached by their content.

The cache may be deleted: pictures of URLs are downloaded again, others are read again when the job is planned.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any, BinaryIO

from madgen.utils.atomic import write_atomically
from madgen.utils.credentials import mask_urls
from madgen.utils.errors import UserError
from madgen.utils.filesystems import WEB, MissingError, check_client_installed, errors_of, file_system, protocol_of

logger = logging.getLogger(__name__)
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
    """Return the content of a URL, from the cache unless it has changed or cannot be reached. Raises UserError."""
    name, (known, known_version) = mask_urls(url), _known(url)
    check_client_installed("picture", url)
    try:
        with errors_of(name):
            fs, root = file_system(url)
            info = fs.info(root)
    except MissingError:
        raise
    except UserError as error:
        if known is None:
            raise
        logger.warning("%s; its copy in the cache is used", error)
        return known
    version = _version(info)
    if known is not None and known_version == version is not None:
        return known
    if info.get("type") == "directory":
        raise UserError(f"{name} is a folder; name a picture in it")
    if (info.get("size") or 0) > MAX_BYTES:
        raise too_large(name)
    with errors_of(name), fs.open(root, "rb", **({"block_size": 0} if protocol_of(url) in WEB else {})) as stream:
        content = _limited(stream, name)
    entry = {"sha256": store(content).name, "version": version}
    _entry(url).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(_entry(url), json.dumps(entry).encode())
    return content


def _known(url: str) -> tuple[bytes | None, str | None]:
    """Return the content and the version of a URL that are cached; None if they are missing or damaged."""
    try:
        entry = json.loads(_entry(url).read_bytes())
        return cached(entry["sha256"]), entry["version"]
    except (OSError, ValueError, LookupError, TypeError):
        return None, None


def _entry(url: str) -> Path:
    return cache_folder() / "urls" / hashlib.blake2b(url.encode(), digest_size=16).hexdigest()


def _version(info: dict[str, Any]) -> str | None:
    """Return what changes with the content of a file; None if its file system does not say."""
    version = {name: info[name] for name in VERSIONS if info.get(name)}
    return json.dumps([info.get("size"), version], default=str, sort_keys=True) if version else None


def _limited(stream: BinaryIO, name: str) -> bytes:
    """Read a stream to its end, which may be endless, whatever its size is claimed to be."""
    parts, size = [], 0
    while part := stream.read(1 << 20):
        parts.append(part)
        size += len(part)
        if size > MAX_BYTES:
            raise too_large(name)
    return b"".join(parts)


def too_large(name: str) -> UserError:
    """Return the error of a picture file of more than `MAX_BYTES`."""
    return UserError(f"{name} has more than {MAX_BYTES >> 20} MiB; save the picture with compression")


def _file_of(sha256: str) -> Path:
    return cache_folder() / sha256[:2] / sha256


def content_of(url: str, sha256: str) -> bytes:
    """Return the picture of a URL as it was planned. Raises UserError if it has changed since."""
    content = cached(sha256) or download(url)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(
            f"the picture {mask_urls(url)} has changed since the job was planned; restore it, or start a new dataset"
        )
    return content
