"""Upload files to a folder of any fsspec file system, and verify them."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from madgen.utils.credentials import mask
from madgen.utils.filesystems import file_system, protocol_of

PART = 50 * 2**20
"""Part size of S3 multipart uploads in bytes; the ETag depends on it."""
OPTIONS: dict[str, dict[str, Any]] = {"s3": {"chunksize": PART, "max_concurrency": 4}}
"""Arguments of `put_file` by protocol."""
WITHOUT_FOLDERS = {"s3", "gs", "az", "abfs", "hf", "oss", "oci"}
"""Object stores: names may contain slashes without creating folders, and uploads are atomic."""
RENAMES = {"file"}
"""Protocols that need an upload to a temporary name and a rename to be atomic."""
READ = 2**20  # bytes at a time


class Remote:
    """A remote folder; file names are relative to its URL. Methods raise the errors of the file system."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.fs, self.root = file_system(self.url)
        self.protocol = protocol_of(url)

    def listing(self) -> dict[str, dict[str, Any]]:
        """Return the fsspec info of each file by its name."""
        self.fs.invalidate_cache()
        files = self.fs.find(self.root, detail=True)
        return {path.removeprefix(self.root).lstrip("/"): info for path, info in files.items()}

    def info(self, name: str) -> dict[str, Any] | None:
        """Return the fsspec info of a file; None if it does not exist."""
        self.fs.invalidate_cache()
        try:
            return self.fs.info(f"{self.root}/{name}")
        except FileNotFoundError:
            return None

    def read(self, name: str) -> bytes:
        """Read a small file."""
        return self.fs.cat_file(f"{self.root}/{name}")

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(f"{self.root}/{name}")

    def put(self, path: Path, name: str) -> None:
        """Upload a file, overwriting an existing one."""
        target = f"{self.root}/{name}"
        folder, _, last = target.rpartition("/")
        if self.protocol not in WITHOUT_FOLDERS:
            self.fs.makedirs(folder, exist_ok=True)
        if self.protocol not in RENAMES:
            self.fs.put_file(str(path), target, **OPTIONS.get(self.protocol, {}))
            return
        temporary = f"{folder}/.{last}.{secrets.token_hex(6)}.part"
        self.fs.put_file(str(path), temporary)
        self.fs.mv(temporary, target)

    def same(self, path: Path, name: str, info: dict[str, Any] | None) -> str | None:
        """Compare a local file with an uploaded one of this `info`.

        Returns the method that proves them equal (a checksum of the store, or `reading back`); None if they differ.
        """
        if info is None or info.get("size") != path.stat().st_size:
            return None
        for kind, checksum, compute in _checksums(info):
            if checksum == compute(path):
                return kind
        with self.fs.open(f"{self.root}/{name}", "rb", block_size=READ) as stream:
            digest = hashlib.sha256()
            while chunk := stream.read(READ):
                digest.update(chunk)
        return "reading back" if digest.hexdigest() == _digest(path, hashlib.sha256) else None


def _checksums(info: dict[str, Any]) -> Iterator[tuple[str, str, Callable[[Path], str]]]:
    """Yield the checksums in a file's info: name, hex value, and a function that computes it for a local file.

    Covers the fsspec file systems of S3, Google Cloud Storage, Azure and the Hugging Face hub. A mismatch proves
    nothing: with KMS keys, S3's ETag is not an MD5, and it depends on the part size of the uploading client.
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
    """Return the MD5 of a file in hex."""
    return _digest(path, lambda: hashlib.md5(usedforsecurity=False))


def md5_of_parts(path: Path, part: int = PART) -> str:
    """Return S3's ETag of a multipart upload: the MD5 of the parts' MD5s, and the number of parts."""
    digests = []
    with open(path, "rb") as stream:
        while chunk := stream.read(part):
            digests.append(hashlib.md5(chunk, usedforsecurity=False).digest())
    return f"{hashlib.md5(b''.join(digests), usedforsecurity=False).hexdigest()}-{len(digests)}"


def _git_blob(path: Path) -> str:
    head = f"blob {path.stat().st_size}\0".encode()
    return hashlib.sha1(head + path.read_bytes(), usedforsecurity=False).hexdigest()  # only used for small files


def describe_error(error: BaseException) -> str:
    """Format an error as one line of at most 300 characters, with the values of secrets masked."""
    text = mask(f"{type(error).__name__}: {' '.join(str(error).split())}")
    return text if len(text) <= 300 else f"{text[:300]}…"
