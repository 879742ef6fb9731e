"""Files in `work/` while a dataset is generated: journals of open shards, claims and heartbeats."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from madgen.dataset.records import NOT_STORED, Finite, Record


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


@dataclass(frozen=True, slots=True)
class Claim(Record):
    """`work/claims/<shard>.json`."""

    worker: str
    token: str = ""
    time: float = 0.0
    """Unix time."""


@dataclass(frozen=True, slots=True)
class Process(Record):
    """Identity of a process, unique across hosts and reboots."""

    host: str
    boot: str
    pid: int
    process_started: str


@dataclass(frozen=True, slots=True)
class Heartbeat(Process):
    """`work/workers/<id>.json`: a worker's process, its claims and its progress."""

    id: str
    state: str
    samples: int
    open: dict[str, int]
    """Settled samples of each open shard."""
    claims: tuple[str, ...] = ()
    rate_per_s: Finite | None = None
    rate_error: Finite | None = None
    """Relative standard error of the rate."""
    megapixels_per_s: Finite | None = None
    memory_bytes: int | None = None
    device: str | None = None
    rank: int | None = None
    shard: str | None = None
    """Shard of the current batch."""
