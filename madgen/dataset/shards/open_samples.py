"""Read the samples of shards that are not finished yet, by their journals."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator
from dataclasses import replace

from madgen.dataset.checks.tar import READ_ERRORS
from madgen.dataset.encoding import decode_members
from madgen.dataset.format import FormatError, InvalidValueError, SampleEntry
from madgen.dataset.layout import SHARD_NAME, DatasetDir
from madgen.dataset.records import parse_object, read_file
from madgen.dataset.shards import journal
from madgen.dataset.shards.journal import Piece

UNREADABLE = (OSError, KeyError, FormatError, InvalidValueError, *READ_ERRORS)
"""Errors of samples that are damaged, or published or removed meanwhile."""


def count_open_samples(directory: DatasetDir, others: Container[str]) -> int:
    """Count the samples in the journals of open shards, except those of `others`; none of them is read."""
    counts: dict[str, int] = {}
    for path in directory.open_shards.glob("*.jsonl"):
        shard = path.name.split(".")[0]
        with contextlib.suppress(OSError, FormatError):  # removed by the worker that has resumed it, or no file
            if shard not in others:
                counts[shard] = max(counts.get(shard, 0), read_file(path).count(b"\n"))
    return sum(counts.values())


def open_pieces(directory: DatasetDir, done: Container[str]) -> Iterator[tuple[str, str, Piece]]:
    """Yield shard, key and location of each intact sample in the open shards that are not in `done`, each key once."""
    for shard in sorted({path.name.partition(".")[0] for path in directory.open_shards.glob("*.jsonl")}):
        if shard in done or SHARD_NAME.fullmatch(shard) is None:
            continue
        keys: set[str] = set()
        for log in sorted(directory.open_shards.glob(f"{shard}.*.jsonl")):
            tar = log.with_suffix(".tar")
            try:
                pieces = list(journal.read(log, tar if tar.exists() else directory.tar(shard)))
            except OSError:  # of a user whose files this user may not read
                continue
            for key, settled in pieces:
                if isinstance(settled, Piece) and key not in keys:
                    keys.add(key)
                    yield shard, key, settled


def open_samples(directory: DatasetDir) -> Iterator[SampleEntry]:
    """Yield the intact samples of open shards, as the sidecar will list them; unreadable ones are left out."""
    for shard, key, piece in open_pieces(directory, directory.done()):
        try:
            metadata = parse_object(decode_members(journal.records_of(piece), key)["json"], piece.path)
            fields = {name: metadata.get(name) for name in ("seed", "prompt", "height", "width")}
            location = {"offset": piece.offset, "size": piece.size, "sha256": piece.sha256}
            entry = SampleEntry.from_dict({"key": key, **fields, **location, "scores": piece.scores})
        except UNREADABLE:
            continue
        yield replace(entry, shard=shard, open_tar=piece.path)
