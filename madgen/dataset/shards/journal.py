"""What an open shard holds so far: a line a sample, written after its bytes, so a kill loses only what was in flight.

Every sample is checked by checksum when it is read back: neither the journal nor its tar needs to survive whole.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from madgen.dataset.format import SampleEntry, to_json


@dataclass(frozen=True, slots=True)
class Piece:
    """A whole sample that lies in a file: its tar records, headers and padding included."""

    path: Path
    offset: int
    """Bytes."""
    size: int
    """Bytes."""
    sha256: str
    scores: dict[str, float] | None = None
    """As in its JSON."""


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A sample that could not be made, and why."""

    reason: str
    detail: str


Settled = Piece | Quarantined
"""What became of a sample."""


def line(key: str, settled: Settled) -> bytes:
    """One sample's line."""
    if isinstance(settled, Quarantined):
        return to_json({"key": key, "reason": settled.reason, "detail": settled.detail})
    return to_json({"key": key, **span(settled)})


def span(piece: Piece) -> dict[str, Any]:
    """What a journal and a sidecar say of a piece: where it lies in its tar, and its scores if it has any."""
    where = {"offset": piece.offset, "size": piece.size, "sha256": piece.sha256}
    return where if piece.scores is None else {**where, "scores": piece.scores}


def piece(path: Path, entry: SampleEntry) -> Piece:
    """Return the place of a sidecar's sample, in the file at `path`."""
    return Piece(path, entry.offset, entry.size, entry.sha256, entry.scores)


def read(journal: Path, tar: Path) -> Iterator[tuple[str, Settled]]:
    """Key and fate of each sample of which `tar` still holds every byte, or which is quarantined."""
    try:
        lines, stream = journal.read_bytes().splitlines(), _open(tar)
    except FileNotFoundError:  # another worker has tidied up
        return
    try:
        for text in lines:
            entry = _parse(text)
            if entry is None:
                return  # cut by a kill: nothing comes after it
            if "reason" in entry:
                yield entry["key"], Quarantined(entry["reason"], entry["detail"])
            elif stream is not None and _is_whole(stream, entry):
                kept = Piece(tar, entry["offset"], entry["size"], entry["sha256"], entry.get("scores"))
                yield entry["key"], kept
    finally:
        if stream is not None:
            stream.close()


def _open(path: Path) -> BinaryIO | None:
    try:
        return open(path, "rb")
    except FileNotFoundError:
        return None


def _parse(text: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(text)
    except ValueError:
        return None
    known = isinstance(entry, dict) and (entry.keys() >= {"key", "reason", "detail"} or _is_span(entry))
    return entry if known else None


def _is_span(entry: dict[str, Any]) -> bool:
    numbers = all(type(entry.get(name)) is int and entry[name] >= 0 for name in ("offset", "size"))
    return numbers and entry.keys() >= {"key", "sha256"} and isinstance(entry.get("scores"), dict | None)


def _is_whole(stream: BinaryIO, entry: dict[str, Any]) -> bool:
    try:
        return span_sha256(stream, entry["offset"], entry["size"]) == entry["sha256"]
    except OSError:
        return False


def span_sha256(stream: BinaryIO, offset: int, size: int) -> str:
    """sha256 of `size` bytes of an open file at `offset`; OSError if it ends early."""
    digest = hashlib.sha256()
    for chunk in chunks(stream, offset, size):
        digest.update(chunk)
    return digest.hexdigest()


def chunks(stream: BinaryIO, offset: int, size: int) -> Iterator[bytes]:
    """`size` bytes of an open file at `offset`, a MiB at a time; OSError if it ends early."""
    stream.seek(offset)
    while size > 0:
        chunk = stream.read(min(size, 1 << 20))
        if not chunk:
            raise OSError(errno.EIO, f"the file ends {size} bytes early")
        yield chunk
        size -= len(chunk)
