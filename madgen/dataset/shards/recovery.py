"""Recover intact samples of unfinished shards, from abandoned open shards or from a tar without a sidecar."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from madgen.dataset.checks.shard import sidecar_time
from madgen.dataset.format import SampleEntry
from madgen.dataset.index import write_index, write_quarantine
from madgen.dataset.layout import DatasetDir
from madgen.dataset.shards import journal
from madgen.dataset.shards.journal import Piece, Quarantined, Settled
from madgen.dataset.verify import Verdict
from madgen.types import Shard, Task
from madgen.utils.atomic import write_atomically
from madgen.utils.console import plural
from madgen.utils.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Salvage:
    """Recovered samples by their position in the shard, and the files to remove once they have been copied."""

    kept: dict[int, Settled] = field(default_factory=dict)
    sources: list[Path] = field(default_factory=list)


def salvage(directory: DatasetDir, shard: Shard, retry: bool = False) -> Salvage:
    """Find the intact samples of a shard that this worker has leased, by the checksums of its journals.

    Samples of another plan or dataset are left out. With `retry`, quarantined samples count as missing.
    """
    fingerprints = directory.read_manifest().portion(shard.index).fingerprints
    positions = {task.key: position for position, task in enumerate(shard.tasks)}
    kept: dict[int, Settled] = {}
    sources: list[Path] = []
    for log in sorted(directory.open_shards.glob(f"{shard.name}.*.jsonl")):
        sources += [log, log.with_suffix(".tar")]
        for settled in journal.read(log, directory.tar(shard.name)):
            position = positions.get(settled.key)
            if position is None or position in kept or (retry and isinstance(settled, Quarantined)):
                continue
            if isinstance(settled, Quarantined) or _is_planned(settled, shard.tasks[position], fingerprints):
                kept[position] = settled
    for path in directory.open_shards.glob(f"{shard.name}.*.tar"):
        sources += [path] if path not in sources else []  # without a journal it cannot be recovered
    return Salvage(kept, sources)


def _is_planned(piece: Piece, task: Task, fingerprints: frozenset[str]) -> bool:
    """Return whether the records of a sample are those of a task: its members, prompt, size and seed."""
    try:
        metadata = journal.read_metadata(piece)
    except journal.UNREADABLE:
        return False
    prompt = task.prompt
    expected = {"key": task.key, "seed": task.seed, "prompt": prompt.text, "negative_prompt": prompt.negative}
    expected |= {"height": prompt.height, "width": prompt.width}
    same = all(metadata[name] == value for name, value in expected.items() if name in metadata)
    return same and ("fingerprint" not in metadata or metadata["fingerprint"] in fingerprints)


def reopen(directory: DatasetDir, name: str, entries: Iterable[SampleEntry]) -> None:
    """Reopen a finished shard to regenerate all samples except those of the given sidecar entries.

    The journal is written before the sidecar is removed, so a crash in between leaves the shard unchanged.
    """
    pieces = (Piece(entry.key, entry.offset, entry.size, entry.sha256, entry.scores) for entry in entries)
    lines = b"".join(piece.to_json() for piece in pieces)
    directory.make_in_work(directory.open_shards)
    write_atomically(directory.open_shards / f"{name}.{secrets.token_hex(6)}.jsonl", lines)
    for path in (directory.tar(name), directory.sidecar(name)):
        if os.path.lexists(path) and not path.is_file() and not path.is_symlink():
            set_aside(directory, path)
    directory.sidecar(name).unlink(missing_ok=True)


def set_aside(directory: DatasetDir, path: Path) -> Path:
    """Move a file or folder that does not belong to the dataset to `unplanned/`, under a free name; return its path."""
    folder = directory.root / "unplanned"
    folder.mkdir(exist_ok=True)
    target = folder / path.name
    while os.path.lexists(target):
        target = folder / f"{path.name}.{secrets.token_hex(3)}"
    os.rename(path, target)
    return target


def reopen_quarantined(directory: DatasetDir, names: Container[str]) -> int:
    """Reopen those of the named shards that have quarantined samples; return the number of quarantined samples."""
    count = 0
    for sidecar in directory.sidecars():
        if sidecar.quarantine and sidecar.shard in names:
            count += len(sidecar.quarantine)
            reopen(directory, sidecar.shard, sidecar.samples)
    return count


@dataclass(frozen=True)
class Repaired:
    """The result of a repair."""

    shards: int = 0
    """Shards marked for regeneration."""
    samples: int | None = 0
    """Samples to generate; None if only the plan can tell."""
    moved: int = 0
    """Files moved to `unplanned/`."""
    derived: bool = False
    """Whether index, card and quarantine list were written again."""


def repair(directory: DatasetDir, verdict: Verdict) -> Repaired:
    """Reopen the shards that `verify` found broken, keeping their intact samples, and move unplanned files aside.

    Shards whose sidecar was written after the check are left alone.
    """
    made_by = directory.read_manifest().made_by
    if made_by is not None and verdict.problems != verdict.derived:
        raise UserError(f"{directory.root} was not generated: remove it, then madgen {made_by} again")
    reopened = [name for name, broken in verdict.broken.items() if sidecar_time(directory, name) == broken.changed]
    for name in reopened:
        reopen(directory, name, verdict.broken[name].whole)
    lost = verdict.lost if len(reopened) == len(verdict.broken) else None
    for path in verdict.unplanned:
        with contextlib.suppress(FileNotFoundError):
            set_aside(directory, path)
    if verdict.derived:
        _write_derived(directory)
    return Repaired(len(reopened), lost if reopened else 0, len(verdict.unplanned), bool(verdict.derived))


def _write_derived(directory: DatasetDir) -> None:
    for name in ("index.parquet", "README.md", "quarantine.jsonl", "samples"):
        path = directory.root / name
        if os.path.lexists(path) and not (path.is_dir() if name == "samples" else path.is_file()):
            set_aside(directory, path)
    write_index(directory)
    write_quarantine(directory)


def print_repaired(directory: DatasetDir, repaired: Repaired) -> None:
    """Print what was repaired, and what `generate` has yet to do, on stderr."""
    if repaired.shards:
        samples = "" if repaired.samples is None else f", {plural(repaired.samples, 'sample')} to generate"
        logger.info(
            f"{plural(repaired.shards, 'shard')} marked for regeneration{samples}; rerun the job to generate them"
        )
    if repaired.moved:
        logger.info(f"{plural(repaired.moved, 'unplanned file')} moved to {directory.root / 'unplanned'}")
    if repaired.derived:
        logger.info(f"index.parquet and the dataset card of {directory.root} were written again")
