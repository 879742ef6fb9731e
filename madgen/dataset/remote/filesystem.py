"""A folder of any file system that fsspec knows, which files are sent to and checked in. The home of fsspec."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import os
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from madgen.utils.errors import UserError

PART = 50 * 2**20
"""Bytes of a part of what S3 takes in parts: its ETag is told from them."""
OPTIONS: dict[str, dict[str, Any]] = {"s3": {"chunksize": PART, "max_concurrency": 4}}
"""Of `put_file`."""
WITHOUT_FOLDERS = {"s3", "gs", "az", "abfs", "hf", "oss", "oci"}
"""Object stores: a name may have slashes, and a file is there whole or not at all."""
RENAMES = {"file"}
"""Here a file is written under another name first."""
EXTRAS = {"s3": "pip install 'madgen[s3]'", "gs": "pip install 'madgen[gcs]'"}
SAME = {"s3a": "s3", "gcs": "gs", "local": "file"}
READ = 2**20  # bytes at a time


def check_at_hand(name: str, url: str) -> None:
    """UserError, without asking anybody, if no file system of this protocol is installed."""
    from fsspec.registry import known_implementations, registry

    protocol = url.partition("://")[0]
    if protocol in registry:
        return
    known = known_implementations.get(protocol)
    if known is None:
        raise UserError(f"{name}={url}: fsspec knows no {protocol}://; s3, gs, hf, az, file are some that it knows")
    package = known["class"].partition(".")[0]
    if importlib.util.find_spec(package) is None:
        how = EXTRAS.get(SAME.get(protocol, protocol), f"pip install {package}")
        raise UserError(f"{name}={url}: {protocol}:// needs the package {package}: {how}")


class Remote:
    """A folder by its URL; names are relative to it. Its methods raise whatever the file system raises."""

    def __init__(self, url: str):
        from fsspec.core import url_to_fs

        self.url = url.rstrip("/")
        self.fs, self.root = url_to_fs(self.url)
        protocol = url.partition("://")[0]
        self.protocol = SAME.get(protocol, protocol)

    def listing(self) -> dict[str, dict[str, Any]]:
        """What is known of each file, by its name."""
        self.fs.invalidate_cache()
        found = self.fs.find(self.root, detail=True)
        return {path.removeprefix(self.root).lstrip("/"): info for path, info in found.items()}

    def info(self, name: str) -> dict[str, Any] | None:
        """What is known of a file; None if there is none."""
        self.fs.invalidate_cache()
        try:
            return self.fs.info(f"{self.root}/{name}")
        except FileNotFoundError:
            return None

    def read(self, name: str) -> bytes:
        """A small file."""
        return self.fs.cat_file(f"{self.root}/{name}")

    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""
        try:
            self.fs.rm_file(f"{self.root}/{name}")
        except FileNotFoundError:
            return

    def put(self, path: Path, name: str) -> None:
        """Sends a file, in place of what is under that name."""
        target = f"{self.root}/{name}"
        folder, _, last = target.rpartition("/")
        if self.protocol not in WITHOUT_FOLDERS:
            self.fs.makedirs(folder, exist_ok=True)
        if self.protocol not in RENAMES:
            self.fs.put_file(str(path), target, **OPTIONS.get(self.protocol, {}))
            return
        aside = f"{folder}/.{last}.{secrets.token_hex(6)}.part"
        self.fs.put_file(str(path), aside)
        self.fs.mv(aside, target)

    def same(self, path: Path, name: str, info: dict[str, Any] | None) -> str | None:
        """How it was found that a file is there whole: the store's own checksum, or `reading back`; None if not."""
        if info is None or info.get("size") != path.stat().st_size:
            return None
        for kind, told, of_file in _checksums(info):
            if told == of_file(path):
                return kind
        with self.fs.open(f"{self.root}/{name}", "rb", block_size=READ) as stream:
            digest = hashlib.sha256()
            while chunk := stream.read(READ):
                digest.update(chunk)
        return "reading back" if digest.hexdigest() == _digest(path, hashlib.sha256) else None


def _checksums(info: dict[str, Any]) -> Iterator[tuple[str, str, Callable[[Path], str]]]:
    """The checksums that stores tell of a file: name, value in hex, and how to have it of a local file.

    They are those of S3, Google's, Azure's and the Hugging Face hub's fsspec file systems. One that differs proves
    nothing: S3's is no MD5 where keys of KMS are used, or where others cut the parts.
    """
    etag = str(info.get("ETag") or "").strip('"')
    if re.fullmatch(r"[0-9a-f]{32}", etag):
        yield "ETag", etag, md5
    elif re.fullmatch(r"[0-9a-f]{32}-\d+", etag):
        yield "ETag", etag, md5_of_parts
    encoded = info.get("md5Hash") or (info.get("content_settings") or {}).get("content_md5")
    if encoded:
        raw = base64.b64decode(encoded) if isinstance(encoded, str) else bytes(encoded)
        yield "MD5", raw.hex(), md5
    if (lfs := info.get("lfs")) and lfs["sha256"]:
        yield "SHA-256", lfs["sha256"], lambda path: _digest(path, hashlib.sha256)
    elif info.get("blob_id"):
        yield "git's SHA-1", info["blob_id"], _git_blob


def _digest(path: Path, algorithm: Callable[[], Any]) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, algorithm).hexdigest()


def md5(path: Path) -> str:
    """In hex."""
    return _digest(path, lambda: hashlib.md5(usedforsecurity=False))


def md5_of_parts(path: Path, part: int = PART) -> str:
    """S3's ETag of a file that was sent in parts: the MD5 of their MD5s, and their number."""
    digests = []
    with open(path, "rb") as stream:
        while chunk := stream.read(part):
            digests.append(hashlib.md5(chunk, usedforsecurity=False).digest())
    return f"{hashlib.md5(b''.join(digests), usedforsecurity=False).hexdigest()}-{len(digests)}"


def _git_blob(path: Path) -> str:
    head = f"blob {path.stat().st_size}\0".encode()
    return hashlib.sha1(head + path.read_bytes(), usedforsecurity=False).hexdigest()  # of small files only


SECRET_NAME = re.compile(r"SECRET|TOKEN|PASSW|CREDENTIAL|KEY", re.IGNORECASE)


def told(error: BaseException) -> str:
    """An error in one line for people: without the values of secrets, in case a client has put them in."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    text = re.sub(r"(?i)\b((?:x-amz-)?(?:signature|credential|security-token)|sig)=[^&\s]+", r"\1=***", text)
    for name, value in os.environ.items():
        if SECRET_NAME.search(name) and len(value) >= 8:
            text = text.replace(value, "***")
    return text if len(text) <= 300 else f"{text[:300]}…"
