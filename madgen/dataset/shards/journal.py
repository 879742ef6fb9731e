"""Read and write the journal of an open shard: one line per sample, written after the sample's bytes.

A kill only loses the samples that were not committed. Every sample is verified by its checksum when the journal is
read, so neither the journal nor its tar has to survive completely.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from madgen.dataset.format import FormatError, QuarantineLine, SampleEntry, SampleLine
from madgen.dataset.records import open_file, parse_object, read_file


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
        return QuarantineLine(key, settled.reason, settled.detail).to_json()
    return SampleLine(key, settled.offset, settled.size, settled.sha256, settled.scores).to_json()


def piece(path: Path, entry: SampleEntry) -> Piece:
    """Convert a sidecar entry of the tar at `path` to a piece."""
    return Piece(path, entry.offset, entry.size, entry.sha256, entry.scores)


def read(journal: Path, tar: Path) -> Iterator[tuple[str, Settled]]:
    """Yield key and outcome of each sample that is intact in `tar` or quarantined; damaged lines are left out."""
    try:
        lines = read_file(journal).splitlines()
    except (FileNotFoundError, FormatError):  # removed by another worker
        return
    stream = _open(tar)
    try:
        for text in lines:
            entry = _parse(text, journal)
            if isinstance(entry, QuarantineLine):
                yield entry.key, Quarantined(entry.reason, entry.detail)
            elif entry is not None and stream is not None and is_whole(stream, entry):
                yield entry.key, Piece(tar, entry.offset, entry.size, entry.sha256, entry.scores)
    finally:
        if stream is not None:
            stream.close()


def _open(path: Path) -> BinaryIO | None:
    try:
        return open_file(path)
    except (FileNotFoundError, FormatError):
        return None


def _parse(text: bytes, journal: Path) -> SampleLine | QuarantineLine | None:
    """Parse a line; None if it is damaged, such as the last one before a kill."""
    try:
        kind = QuarantineLine if "reason" in parse_object(text, journal) else SampleLine
        return kind.from_json(text, journal)
    except FormatError:
        return None


def is_whole(stream: BinaryIO, entry: SampleLine | SampleEntry) -> bool:
    """Return whether the records of a sample are in an open file, by their checksum."""
    try:
        return span_sha256(stream, entry.offset, entry.size) == entry.sha256
    except OSError:
        return False


def records_of(piece: Piece) -> bytes:
    """Read the records of a sample. Raises OSError, or FormatError for another kind of file."""
    with open_file(piece.path) as stream:
        return b"".join(chunks(stream, piece.offset, piece.size))


def span_sha256(stream: BinaryIO, offset: int, size: int) -> str:
    """Return the sha256 of `size` bytes of an open file at `offset`. Raises OSError if the file ends early."""
    digest = hashlib.sha256()
    for chunk in chunks(stream, offset, size):
        digest.update(chunk)
    return digest.hexdigest()


def chunks(stream: BinaryIO, offset: int, size: int) -> Iterator[bytes]:
    """Yield `size` bytes of an open file at `offset` in chunks of 1 MiB. Raises OSError if the file ends early."""
    length = os.fstat(stream.fileno()).st_size
    if offset + size > length:  # before anything is copied, or an offset is no offset of any file
        raise OSError(errno.EIO, f"the file ends {offset + size - length} bytes early")
    stream.seek(offset)
    while size > 0:
        chunk = stream.read(min(size, 1 << 20))
        if not chunk:
            raise OSError(errno.EIO, f"the file ends {size} bytes early")
        yield chunk
        size -= len(chunk)
