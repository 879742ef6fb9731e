"""Copy samples of finished shards into new tars, byte for byte or with a prefix of their keys."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from madgen.dataset.checks.tar import READ_ERRORS
from madgen.dataset.encoding import decode_members, encode_members
from madgen.dataset.format import SampleEntry, to_json
from madgen.dataset.layout import DatasetDir
from madgen.dataset.reader import IMAGE_FORMATS
from madgen.dataset.records import open_file, parse_object
from madgen.dataset.shards.writer import end_of_tar
from madgen.images.rewrite_metadata import with_metadata
from madgen.utils.errors import UserError

Kept = dict[str, set[str]]
"""Keys by shard."""


@dataclass(frozen=True)
class SourcePiece:
    """A sample in the open tar of a dataset."""

    directory: DatasetDir
    shard: str
    stream: BinaryIO
    entry: SampleEntry


def selected_entries(source: DatasetDir, kept: Kept) -> Iterator[SampleEntry]:
    """Yield the selected samples, in order."""
    for shard, keys in kept.items():
        yield from (entry for entry in source.read_sidecar(shard).samples if entry.key in keys)


def selected_pieces(source: DatasetDir, kept: Kept) -> Iterator[SourcePiece]:
    """Yield the selected samples, in order, each with its open tar."""
    for shard, keys in kept.items():
        with open_file(source.tar(shard)) as stream:
            yield from (SourcePiece(source, shard, stream, entry) for entry in selected_entries(source, {shard: keys}))


def write_tar(path: Path, pieces: Iterable[SourcePiece], prefix: str = "") -> tuple[SampleEntry, ...]:
    """Write a tar of samples, with `prefix` before their keys; return their sidecar entries.

    Raises UserError if a sample is damaged.
    """
    with open(path, "xb") as tar:
        entries = tuple(_copy(piece, tar, prefix) for piece in pieces)
        tar.write(end_of_tar(tar.tell()))
        tar.flush()
        os.fsync(tar.fileno())
    return entries


def _copy(piece: SourcePiece, tar: BinaryIO, prefix: str) -> SampleEntry:
    entry, offset = piece.entry, tar.tell()
    records = _read(piece)
    if prefix:
        key = f"{prefix}{entry.key}"
        try:
            records = _with_key(records, entry.key, key)
        except (*READ_ERRORS, UserError) as error:
            raise _damaged(piece) from error
        entry = replace(entry, key=key, size=len(records), sha256=hashlib.sha256(records).hexdigest())
    tar.write(records)
    return replace(entry, offset=offset)


def _read(piece: SourcePiece) -> bytes:
    """Read the records of a sample, and compare them with the checksum in the sidecar."""
    entry = piece.entry
    available = os.fstat(piece.stream.fileno()).st_size - entry.offset
    piece.stream.seek(entry.offset)
    records = piece.stream.read(max(0, min(entry.size, available)))
    if len(records) < entry.size or hashlib.sha256(records).hexdigest() != entry.sha256:
        raise _damaged(piece)
    return records


def _damaged(piece: SourcePiece) -> UserError:
    root = piece.directory.root
    return UserError(f"{piece.directory.tar(piece.shard)}: {piece.entry.key} is damaged; run madgen verify {root}")


def _with_key(records: bytes, old: str, key: str) -> bytes:
    """Return the tar records of a sample with another key: in the names of its files, its JSON and its image."""
    members = decode_members(records, old)
    metadata = {**parse_object(members["json"], "its JSON"), "key": key}
    image_format = next(name for name in IMAGE_FORMATS if name in members)
    image = with_metadata(members[image_format], image_format, metadata)
    return encode_members(key, {**members, image_format: image, "json": to_json(metadata)})
