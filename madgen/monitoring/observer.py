"""Base class of monitors, with hooks that a run calls, most of them in its writing thread."""

from __future__ import annotations

from madgen.dataset.format import Manifest
from madgen.dataset.layout import DatasetDir
from madgen.dataset.shards.leases import Worker
from madgen.types import Record


class Observer:
    """Hooks that do nothing. Monitors override some of them, and must neither fail nor slow the run down."""

    def started(self, directory: DatasetDir, worker: Worker, manifest: Manifest) -> None:
        """Called when the dataset's directory exists, before this worker's first batch."""

    def step_done(self, step: int, steps: int) -> None:
        """Called in the sampling thread after denoising step `step` of `steps`, counted from 1, of a batch."""

    def sample_written(self, record: Record) -> None:
        """Called after a sample is written to an open shard."""

    def tripped(self, why: str) -> None:
        """Called when this worker stops because too many samples fail."""

    def ending(self, preempted: bool) -> None:
        """Called after this worker's last write, while its heartbeat still exists; `preempted`: by the scheduler."""

    def stopped(self) -> None:
        """Called when this worker has ended, for any reason."""
