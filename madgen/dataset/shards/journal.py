"""Read and write the journal of an open shard: one line per sample, written after the sample's bytes.

A kill only loses the samples that were not committed. Every sample is verified by its checksum when the journal is
read, so neither the journal nor its tar has to survive completely.
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
    """The location of an intact sample in a file: its tar records, headers and padding included."""

    path: Path
    offset: int
    """Bytes."""
    size: int
    """Bytes."""
    sha256: str
    scores: dict[str, float] | None = None
    """Same as in the JSON of the sample."""


@dataclass(frozen=True, slots=True)
class Quarantined:
    """The reason why a sample could not be generated."""

    reason: str
    detail: str


Settled = Piece | Quarantined
"""The outcome of a task."""


def line(key: str, settled: Settled) -> bytes:
    """Return the journal line of a sample."""
    if isinstance(settled, Quarantined):
        return to_json({"key": key, "reason": settled.reason, "detail": settled.detail})
    return to_json({"key": key, **span(settled)})


def span(piece: Piece) -> dict[str, Any]:
    """Return the JSON fields of a piece: its span in the tar, and its scores if it has any."""
    fields = {"offset": piece.offset, "size": piece.size, "sha256": piece.sha256}
    return fields if piece.scores is None else {**fields, "scores": piece.scores}


def piece(path: Path, entry: SampleEntry) -> Piece:
    """Convert a sidecar entry of the tar at `path` to a piece."""
    return Piece(path, entry.offset, entry.size, entry.sha256, entry.scores)


def read(journal: Path, tar: Path) -> Iterator[tuple[str, Settled]]:
    """Yield key and outcome of each sample that is intact in `tar` or quarantined."""
    try:
        lines, stream = journal.read_bytes().splitlines(), _open(tar)
    except FileNotFoundError:  # removed by another worker
        return
    try:
        for text in lines:
            entry = _parse(text)
            if entry is None:
                return  # truncated by a kill, so it is the last line
            if "reason" in entry:
                yield entry["key"], Quarantined(entry["reason"], entry["detail"])
            elif stream is not None and _is_whole(stream, entry):
                intact = Piece(tar, entry["offset"], entry["size"], entry["sha256"], entry.get("scores"))
                yield entry["key"], intact
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
    """Return the sha256 of `size` bytes of an open file at `offset`. Raises OSError if the file ends early."""
    digest = hashlib.sha256()
    for chunk in chunks(stream, offset, size):
        digest.update(chunk)
    return digest.hexdigest()


def chunks(stream: BinaryIO, offset: int, size: int) -> Iterator[bytes]:
    """Yield `size` bytes of an open file at `offset` in chunks of 1 MiB. Raises OSError if the file ends early."""
    stream.seek(offset)
    while size > 0:
        chunk = stream.read(min(size, 1 << 20))
        if not chunk:
            raise OSError(errno.EIO, f"the file ends {size} bytes early")
        yield chunk
        size -= len(chunk)
