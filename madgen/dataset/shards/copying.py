"""Copy samples of finished shards into new shards, byte for byte or with a prefix of their keys."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import BinaryIO

from madgen.dataset.checks.tar import READ_ERRORS, tar_size
from madgen.dataset.encoding import encode_members
from madgen.dataset.format import SampleEntry, Sidecar, to_json
from madgen.dataset.layout import DatasetDir
from madgen.dataset.reader import IMAGE_FORMATS, damaged_sample, read_members, read_records
from madgen.dataset.records import parse_object
from madgen.images.embedded_metadata import with_metadata
from madgen.types import shard_index
from madgen.utils.atomic import write_atomically
from madgen.utils.errors import UserError

Kept = dict[str, set[str]]
"""Keys by shard."""


def selected_entries(source: DatasetDir, kept: Kept) -> Iterator[SampleEntry]:
    """Yield the selected samples, in order."""
    for shard, keys in kept.items():
        yield from (entry for entry in source.read_sidecar(shard).samples if entry.key in keys)


def write_shard(
    source: DatasetDir, entries: Iterable[SampleEntry], out: DatasetDir, name: str, worker: str, prefix: str = ""
) -> Sidecar:
    """Write samples to a new shard; return its sidecar, without times: the same samples give the same bytes."""
    sidecar = Sidecar(name, shard_index(name), write_tar(source, entries, out, name, prefix), worker=worker)
    write_atomically(out.sidecar(name), sidecar.to_json())
    return sidecar


def write_tar(
    source: DatasetDir, entries: Iterable[SampleEntry], out: DatasetDir, name: str, prefix: str = ""
) -> tuple[SampleEntry, ...]:
    """Write the tar of a shard, with `prefix` before the keys of its samples; return their sidecar entries.

    Raises UserError if a sample is damaged.
    """
    with open(out.tar(name), "xb") as tar:
        written = tuple(_copy(source, entry, tar, prefix) for entry in entries)
        tar.write(bytes(tar_size(tar.tell()) - tar.tell()))
        tar.flush()
        os.fsync(tar.fileno())
    return written


def _copy(source: DatasetDir, entry: SampleEntry, tar: BinaryIO, prefix: str) -> SampleEntry:
    offset = tar.tell()
    if not prefix:
        tar.write(read_records(source, entry))
        return replace(entry, offset=offset)
    records = _with_key(source, entry, key := f"{prefix}{entry.key}")
    tar.write(records)
    return replace(entry, key=key, offset=offset, size=len(records), sha256=hashlib.sha256(records).hexdigest())


def _with_key(source: DatasetDir, entry: SampleEntry, key: str) -> bytes:
    """Return the tar records of a sample with another key: in the names of its files, its JSON and its image."""
    members = read_members(source, entry)
    try:
        metadata = {**parse_object(members["json"], "its JSON"), "key": key}
        image_format = next(name for name in IMAGE_FORMATS if name in members)
        image = with_metadata(members[image_format], image_format, metadata)
    except (*READ_ERRORS, StopIteration, UserError) as error:
        raise damaged_sample(source, entry, str(error) or "no image") from error
    return encode_members(key, {**members, image_format: image, "json": to_json(metadata)})
