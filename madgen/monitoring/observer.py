"""What a monitor is told of a run, by the thread that writes."""

from __future__ import annotations

from dataclasses import dataclass

from madgen.dataset.format import Manifest
from madgen.dataset.layout import DatasetDir
from madgen.dataset.shards.leases import Worker
from madgen.types import Record


@dataclass(frozen=True)
class ShardDone:
    """One shard of this worker is published."""

    name: str
    samples: int
    seconds: dict[str, float]
    """Where this worker's time went: `sample`, `decode`, `write`, `wait`."""


class Observer:
    """Does nothing; monitors override what they need. Nothing here may fail or slow a run down."""

    def started(self, directory: DatasetDir, worker: Worker, manifest: Manifest) -> None:
        """The dataset's directory exists and this worker is about to begin."""

    def sample_written(self, record: Record) -> None:
        """One panorama is in an open shard."""

    def shard_published(self, shard: ShardDone) -> None:
        """One shard is under its final name."""

    def tripped(self, why: str) -> None:
        """This worker stops, because too much failed."""

    def ending(self, preempted: bool) -> None:
        """Nothing more is written by this worker, whose heartbeat is still there; its machine may be wanted back."""

    def stopped(self) -> None:
        """This worker has ended, for whatever reason."""
