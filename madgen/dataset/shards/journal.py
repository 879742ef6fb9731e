"""Journals of open shards: one line per sample, written after the sample's bytes.

A kill only loses the samples that were not committed. Every sample is verified by its checksum when the journal is
read, so neither the journal nor its tar has to survive completely.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Container, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from madgen.dataset.checks.tar import READ_ERRORS
from madgen.dataset.encoding import decode_members
from madgen.dataset.format import SampleEntry
from madgen.dataset.layout import SHARD_NAME, DatasetDir
from madgen.dataset.records import (
    NOT_STORED,
    FormatError,
    InvalidValueError,
    Record,
    open_file,
    parse_object,
    read_file,
)

UNREADABLE = (OSError, FormatError, InvalidValueError, *READ_ERRORS)
"""Errors of samples that are damaged, or published or removed meanwhile."""


@dataclass(frozen=True, slots=True)
class Piece(Record):
    """A line of a journal: a sample that is complete in a tar, with the fields of its sidecar entry."""

    key: str
    offset: int
    size: int
    sha256: str
    scores: dict[str, float] | None = None
    tar: Path = field(default=Path(), metadata=NOT_STORED)


@dataclass(frozen=True, slots=True)
class Quarantined(Record):
    """A line of a journal: a sample that could not be generated."""

    key: str
    reason: str
    detail: str


Settled = Piece | Quarantined
"""The outcome of a task."""


def read(journal: Path, published: Path) -> Iterator[Settled]:
    """Yield the samples that are quarantined, or intact in the open tar; damaged lines are left out.

    If a crash has moved the open tar to its final name, the samples are in `published`.
    """
    tar = journal.with_suffix(".tar")
    tar = tar if tar.exists() else published
    with contextlib.ExitStack() as stack:
        lines, stream = list[bytes](), None
        with contextlib.suppress(FileNotFoundError, FormatError):  # removed by another worker
            lines = read_file(journal).splitlines()
            stream = stack.enter_context(open_file(tar))
        for text in lines:
            settled = _parse(text, journal)
            if isinstance(settled, Quarantined):
                yield settled
            elif settled is not None and stream is not None and is_whole(stream, settled):
                yield replace(settled, tar=tar)


def _parse(text: bytes, journal: Path) -> Settled | None:
    """Parse a line; None if it is damaged, such as the last one before a kill."""
    try:
        kind = Quarantined if "reason" in parse_object(text, journal) else Piece
        return kind.from_json(text, journal)
    except FormatError:
        return None


def is_whole(stream: BinaryIO, sample: Piece | SampleEntry) -> bool:
    """Return whether the records of a sample are in an open file, by their checksum."""
    try:
        return read_records(stream, sample) is not None
    except OSError:
        return False


def read_records(stream: BinaryIO, sample: Piece | SampleEntry) -> bytes | None:
    """Read the tar records of a sample; None if the file ends early, or their checksum differs. Raises OSError."""
    if sample.offset + sample.size > os.fstat(stream.fileno()).st_size:
        return None
    stream.seek(sample.offset)
    records = stream.read(sample.size)
    return records if hashlib.sha256(records).hexdigest() == sample.sha256 else None


def read_metadata(piece: Piece) -> dict[str, Any]:
    """Read the JSON of a sample. Raises one of `UNREADABLE`."""
    with open_file(piece.tar) as stream:
        records = read_records(stream, piece)
    if records is None:
        raise FormatError(f"{piece.tar}: {piece.key} has changed")
    return parse_object(decode_members(records, piece.key)["json"], piece.tar)


def count_open_samples(directory: DatasetDir, others: Container[str]) -> int:
    """Count the samples in the journals of open shards, except those of `others`; none of them is read."""
    counts: dict[str, int] = {}
    for path in directory.open_shards.glob("*.jsonl"):
        shard = path.name.split(".")[0]
        with contextlib.suppress(OSError, FormatError):  # removed by the worker that has resumed it, or no file
            if shard not in others:
                counts[shard] = max(counts.get(shard, 0), read_file(path).count(b"\n"))
    return sum(counts.values())


def open_pieces(directory: DatasetDir, done: Container[str]) -> Iterator[tuple[str, Piece]]:
    """Yield the shard and the location of each intact sample in the open shards not in `done`, each key once."""
    for shard in sorted({path.name.partition(".")[0] for path in directory.open_shards.glob("*.jsonl")}):
        if shard in done or SHARD_NAME.fullmatch(shard) is None:
            continue
        pieces: dict[str, Piece] = {}
        for log in sorted(directory.open_shards.glob(f"{shard}.*.jsonl")):
            with contextlib.suppress(OSError):  # of a user whose files this user may not read
                for settled in list(read(log, directory.tar(shard))):
                    if isinstance(settled, Piece):
                        pieces.setdefault(settled.key, settled)
        yield from ((shard, piece) for piece in pieces.values())


def open_samples(directory: DatasetDir) -> Iterator[SampleEntry]:
    """Yield the intact samples of open shards, as the sidecar will list them; unreadable ones are left out."""
    for shard, piece in open_pieces(directory, directory.done()):
        try:
            metadata = read_metadata(piece)
            fields = {name: metadata.get(name) for name in ("seed", "prompt", "height", "width")}
            entry = SampleEntry.from_dict({**piece.as_dict(), **fields})
        except UNREADABLE:
            continue
        yield replace(entry, shard=shard, open_tar=piece.tar)
