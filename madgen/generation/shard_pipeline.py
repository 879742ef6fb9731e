"""Write sampled batches to shards and publish them, in a thread beside the sampling. Independent of Lightning."""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from madgen.config.schema import Job
from madgen.dataset.encoding import encode_sample
from madgen.dataset.remote.background import BackgroundUpload
from madgen.dataset.sample_json import sample_metadata, with_changes, with_scores
from madgen.dataset.shards.writer import OpenShard
from madgen.generation.circuit_breaker import CircuitBreaker
from madgen.generation.robust_sampler import UNSAFE
from madgen.generation.scoring import PixelScores
from madgen.generation.work_queue import WorkQueue
from madgen.monitoring.observer import Observer
from madgen.monitoring.rate import Rate
from madgen.types import Attempt, Batch, Panoramas, Record

logger = logging.getLogger(__name__)

UPLOAD = "upload"
"""Lease of the process that uploads the shards that earlier runs left."""


class ShardPipeline:
    """Encode and write one batch while the next one is sampled; publish and upload complete shards.

    A killed process loses these two batches at most.
    """

    def __init__(self, job: Job, observers: Sequence[Observer] = ()):
        self.job, self.observers = job, list(observers)
        self._rate, self._pixels = Rate(), Rate()
        self._breaker = CircuitBreaker(job.quarantine.max_share, job.quarantine.window)
        self._thread: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None
        self._uploads: BackgroundUpload | None = None

    @property
    def tripped(self) -> str | None:
        """Why this process stopped, if too many samples failed."""
        return self._breaker.tripped

    @property
    def written(self) -> int:
        """Number of panoramas that this process generated."""
        return self._rate.total

    def start(self, queue: WorkQueue) -> None:
        """Start to write the batches of a queue that has been started."""
        self.queue, self._pixel_scores = queue, PixelScores(queue.run)
        self._rate.begin()
        self._pixels.begin()
        queue.worker.measure = self._measure
        self._notify("started", queue.run.directory, queue.worker, queue.run.manifest)
        if self.job.output.upload is not None:
            claimed = queue.worker.claim(UPLOAD)
            self._uploads = BackgroundUpload(queue.run.directory, self.job.output.upload)
            self._uploads.start(sweep=claimed)
        self._thread = ThreadPoolExecutor(1, "shard-writer")

    def put(self, batch: Batch, panoramas: Panoramas) -> None:
        """Hand over a batch once the previous one is written. Raises the error if writing that one failed."""
        assert self._thread is not None
        started = time.perf_counter()
        self._wait()
        waited = time.perf_counter() - started
        self._pending = self._thread.submit(self._write, batch, panoramas, waited)

    def step_done(self, step: int, steps: int) -> None:
        """Report a denoising step of the batch that is being sampled."""
        self._notify("step_done", step, steps)

    def finish(self, preempted: bool) -> None:
        """Write the last batch, then upload it unless the run is stopped. Raises the error if writing failed."""
        try:
            self._wait()
        finally:
            self._close(preempted, wait_for_uploads=True)

    def abort(self, preempted: bool) -> None:
        """Write the last batch after an error in sampling, and release the shards."""
        if self._thread is not None:
            self._close(preempted, wait_for_uploads=False)

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _close(self, preempted: bool, wait_for_uploads: bool) -> None:
        assert self._thread is not None
        self._thread.shutdown()
        self._thread = self._pending = None
        self._notify("ending", preempted or self.queue.out_of_time is not None)
        self.queue.release_shards()
        self._notify("stopped")
        self.queue.close()
        if self._uploads is not None:
            self._uploads.finish(lambda: self.queue.stopping or not wait_for_uploads)

    def _write(self, batch: Batch, panoramas: Panoramas, waited: float) -> None:
        try:
            self._write_batch(batch, panoramas, waited)
        except BaseException:
            self.queue.stop()
            raise

    def _write_batch(self, batch: Batch, panoramas: Panoramas, waited: float) -> None:
        started, made, pixels = time.perf_counter(), 0, 0
        shard = self.queue.open_shards[batch.shard.name]
        for position, attempt in enumerate(panoramas.attempts, batch.start):
            if position >= len(shard.settled):  # otherwise an earlier worker generated it
                self._settle(shard, position, attempt)
                if attempt.image_HWC is not None:
                    made, pixels = made + 1, pixels + attempt.image_HWC[..., 0].size
        if made:
            self._rate.add(made)
            self._pixels.add(pixels)
        seconds = {**panoramas.seconds, "write": time.perf_counter() - started, "wait": waited}
        shard.commit(seconds, self.queue.cost(batch))
        if shard.complete and self.queue.publish(shard) and self._uploads is not None:
            self._uploads.add(shard.shard.name)
        progress = {name: len(opened.settled) for name, opened in dict(self.queue.open_shards).items()}
        self.queue.worker.beat(open=progress)

    def _settle(self, shard: OpenShard, position: int, attempt: Attempt) -> None:
        task, output = shard.shard.tasks[position], self.job.output
        self._count(failed=attempt.image_HWC is None and attempt.reason != UNSAFE)
        if attempt.image_HWC is None:
            shard.quarantine(position, attempt.reason or "unknown", attempt.detail)
            logger.warning(f"{task.key} is quarantined: {attempt.reason}: {attempt.detail}")
            return
        metadata = with_changes(sample_metadata(task, self.queue.run.sample_settings(shard.shard)), attempt.changes)
        metadata = with_scores(metadata, self._pixel_scores(attempt.image_HWC))
        record = Record(task, attempt.image_HWC, metadata)
        shard.add(position, encode_sample(record, output.format, output.quality), metadata.get("scores"))
        self._notify("sample_written", record)

    def _count(self, failed: bool) -> None:
        """Stop the run if too many samples fail, so that a broken model does not waste GPU hours."""
        before = self._breaker.tripped
        self._breaker.record(failed)
        if self._breaker.tripped and before is None:
            self.queue.stop()
            self._notify("tripped", self._breaker.tripped)

    def _measure(self) -> dict[str, Any]:
        """Return this worker's throughput for its heartbeat, also while a batch takes long."""
        pixels = self._pixels.per_second()
        return {
            "samples": self._rate.total,
            "rate_per_s": self._rate.per_second(),
            "rate_error": self._rate.error(),
            "megapixels_per_s": None if pixels is None else pixels / 1e6,
            "memory_bytes": _peak_memory(),
        }

    def _notify(self, event: str, *arguments: Any) -> None:
        """Call the observers. Monitoring never stops a run: an observer that fails is reported once and removed."""
        for observer in list(self.observers):
            try:
                getattr(observer, event)(*arguments)
            except Exception as error:
                logger.warning(f"{type(observer).__name__} is off: {error!r}")
                self.observers.remove(observer)


def _peak_memory() -> int:
    """Return the peak in bytes: of GPU memory if a GPU is in use, else of resident memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
