"""Base class of monitors, with hooks that the writing thread calls."""

from __future__ import annotations

from dataclasses import dataclass

from madgen.dataset.format import Manifest
from madgen.dataset.layout import DatasetDir
from madgen.dataset.shards.leases import Worker
from madgen.types import Record


@dataclass(frozen=True)
class ShardDone:
    """A published shard."""

    name: str
    samples: int
    seconds: dict[str, float]
    """This worker's time by activity: `sample`, `decode`, `write`, `wait`."""


class Observer:
    """Hooks that do nothing. Monitors override some of them, and must neither fail nor slow the run down."""

    def started(self, directory: DatasetDir, worker: Worker, manifest: Manifest) -> None:
        """Called when the dataset's directory exists, before this worker's first batch."""

    def sample_written(self, record: Record) -> None:
        """Called after a sample is written to an open shard."""

    def shard_published(self, shard: ShardDone) -> None:
        """Called after a shard is renamed to its final name."""

    def tripped(self, why: str) -> None:
        """Called when this worker stops because too many samples fail."""

    def ending(self, preempted: bool) -> None:
        """Called after this worker's last write, while its heartbeat still exists; `preempted`: by the scheduler."""

    def stopped(self) -> None:
        """Called when this worker has ended, for any reason."""
