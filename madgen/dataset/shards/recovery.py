"""Recover intact samples of unfinished shards, from abandoned open shards or from a tar without a sidecar."""

from __future__ import annotations

import secrets
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from madgen.dataset.format import SampleEntry
from madgen.dataset.layout import DatasetDir
from madgen.dataset.shards import journal
from madgen.dataset.shards.journal import Quarantined, Settled
from madgen.dataset.verify import Verdict, planned_samples, sidecar_time
from madgen.types import Shard
from madgen.utils.atomic import write_atomically
from madgen.utils.errors import UserError


@dataclass(frozen=True)
class Salvage:
    """Recovered samples by their position in the shard, and the files to remove once they have been copied."""

    kept: dict[int, Settled] = field(default_factory=dict)
    sources: list[Path] = field(default_factory=list)


def salvage(directory: DatasetDir, shard: Shard, retry: bool = False) -> Salvage:
    """Find the intact samples of a shard that this worker has leased, by the checksums of its journals.

    With `retry`, quarantined samples count as missing.
    """
    positions = {task.key: position for position, task in enumerate(shard.tasks)}
    kept: dict[int, Settled] = {}
    sources: list[Path] = []
    published = directory.tar(shard.name)
    for log in sorted(directory.open_shards.glob(f"{shard.name}.*.jsonl")):
        tar = log.with_suffix(".tar")
        sources += [log, tar]
        for key, settled in journal.read(log, tar if tar.exists() else published):
            if key in positions and not (retry and isinstance(settled, Quarantined)):
                kept.setdefault(positions[key], settled)
    for path in directory.open_shards.glob(f"{shard.name}.*.tar"):
        sources += [path] if path not in sources else []  # without a journal it cannot be recovered
    return Salvage(kept, sources)


def sample_spans(path: Path) -> list[tuple[str, int, int]]:
    """Return (key, offset, size) of the tar records of each sample in bytes, headers and padding included."""
    spans: list[tuple[str, int, int]] = []
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            key = member.name.partition(".")[0]
            end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            if spans and spans[-1][0] == key:
                spans[-1] = (key, spans[-1][1], end - spans[-1][1])
            else:
                spans.append((key, member.offset, end - member.offset))
    return spans


def reopen(directory: DatasetDir, name: str, entries: Iterable[SampleEntry]) -> None:
    """Reopen a finished shard to regenerate all samples except those of the given sidecar entries.

    The journal is written before the sidecar is removed, so a crash in between leaves the shard unchanged.
    """
    lines = b"".join(journal.line(entry.key, journal.piece(Path(), entry)) for entry in entries)
    directory.make_in_work(directory.open_shards)
    write_atomically(directory.open_shards / f"{name}.{secrets.token_hex(6)}.jsonl", lines)
    directory.sidecar(name).unlink(missing_ok=True)


def reopen_quarantined(directory: DatasetDir) -> int:
    """Reopen every shard with quarantined samples; return the number of quarantined samples."""
    count = 0
    for sidecar in directory.sidecars():
        if sidecar.quarantine:
            count += len(sidecar.quarantine)
            reopen(directory, sidecar.shard, sidecar.samples)
    return count


def repair(directory: DatasetDir, verdict: Verdict) -> int:
    """Reopen the shards that `verify` found broken, keeping their intact samples; return the number of lost samples.

    Shards whose sidecar was written after the check, and files that were not planned, are left alone.
    """
    manifest, lost = directory.read_manifest(), 0
    if manifest.filtered is not None:
        raise UserError(f"{directory.root} was not generated: remove it, then madgen filter again")
    for name, broken in verdict.broken.items():
        if sidecar_time(directory, name) == broken.changed:
            reopen(directory, name, broken.whole)
            lost += planned_samples(manifest.plan, name) - len(broken.whole)
    return lost
