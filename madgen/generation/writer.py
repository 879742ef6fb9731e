"""The ShardWriter callback: encodes and writes beside the sampling, and publishes shards."""

from __future__ import annotations

import queue
import signal
import threading
import time
from dataclasses import dataclass
from typing import Any

import lightning
from lightning import LightningModule, Trainer

from madgen.cluster.memory import peak_memory
from madgen.cluster.signals import StopSignals
from madgen.config.schema import Job, require_job
from madgen.dataset.encoding import encode_sample
from madgen.dataset.layout import DatasetDir
from madgen.dataset.remote.background import BackgroundUpload
from madgen.dataset.sample_json import sample_metadata, with_changes, with_scores
from madgen.dataset.shards.writer import OpenShard
from madgen.generation.circuit_breaker import Breaker
from madgen.generation.datamodule import PromptDataModule
from madgen.generation.module import Panoramas
from madgen.generation.robust_sampler import UNSAFE
from madgen.monitoring.observer import Observer, ShardDone
from madgen.monitoring.rate import Rate
from madgen.types import Attempt, Batch, Idle, Record
from madgen.utils.console import say

UPLOAD = "upload"
"""The claim of the process that sends what others have left unsent."""


@dataclass(frozen=True)
class _Finished:
    batch: Batch
    panoramas: Panoramas


class ShardWriter(lightning.Callback):
    """Writes what `PanoramaModule` samples for the batches of a `PromptDataModule`.

    One batch is written while the next one is sampled, so a killed process loses these two at most. On the first
    process (global rank 0) the `observers` are told of it.
    """

    def __init__(self, job: Job, observers: tuple[Observer, ...] = ()):
        self.job, self.observers = require_job(job), observers
        self.directory = DatasetDir(job.output_dir)
        self.signals = StopSignals()
        self._queue: queue.Queue[_Finished | None] = queue.Queue(1)
        self._idle = threading.Event()  # nothing is being written
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._waited = 0.0
        self._rate, self._pixels = Rate(), Rate()
        self._uploads = None if job.output.upload is None else BackgroundUpload(self.directory, job.output.upload)
        self._breaker = Breaker(job.quarantine.max_share, job.quarantine.window)

    @property
    def tripped(self) -> str | None:
        """Why this process stopped: too much failed."""
        return self._breaker.tripped

    @property
    def written(self) -> int:
        """Panoramas that this process made."""
        return self._rate.total

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes over the signals and starts the thread that writes."""
        self.data: PromptDataModule = trainer.datamodule
        self.signals.install(lambda: self._stop(trainer))
        if trainer.global_rank != 0:
            self.observers = ()
        self._rate.begin()
        self._pixels.begin()
        self.data.worker.measure = self._measure
        self._tell("started", self.directory, self.data.worker, self.data.manifest)
        self._idle.set()
        self.data.writing = True
        if self._uploads is not None:
            claimed = self.data.worker.claim(UPLOAD)
            self._uploads.start(sweep=lambda: claimed)
        self._thread = threading.Thread(target=self._write, name="shard-writer", daemon=True)
        self._thread.start()

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch | Idle,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Hands the batch over, once the one before it is written."""
        if isinstance(batch, Idle) or outputs is None:
            return
        waiting = time.perf_counter()
        self._put(_Finished(batch, outputs))
        self._waited += time.perf_counter() - waiting

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes what is left, then raises what went wrong, if anything did."""
        self._put(None)
        self.close(wait_for_upload=True)
        if self._error is not None:
            raise self._error

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Sampling failed: what was finished before is still written."""
        if self._thread is not None and self._error is None:
            self._put(None)
        self.close()

    def close(self, wait_for_upload: bool = False) -> None:
        """Ends the writing thread; unfinished shards are left for the next worker, claims are given back."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self.data.writing = False
            self._tell("ending", self.signals.preempting or self.data.out_of_time is not None)
            self.data.give_back()
            self._tell("stopped")
            self.data.leave()
        if self._uploads is not None:
            stopped = self.data.stopping.is_set if wait_for_upload else lambda: True
            self._uploads.finish(stopped)
        self.signals.restore()

    def _stop(self, trainer: Trainer) -> None:
        """No further batch here, nor in the processes that this one has started."""
        self.data.stop()
        if trainer.strategy.launcher is not None and getattr(trainer.strategy.launcher, "procs", None):
            trainer.strategy.launcher.kill(signal.SIGTERM)

    def _put(self, item: _Finished | None) -> None:
        """Never blocks on a writer that has died."""
        while self._error is None:
            if self._idle.wait(0.5):
                self._idle.clear()
                return self._queue.put(item)
        if item is not None:
            self.data.stop()
        return None

    def _write(self) -> None:
        try:
            while (item := self._queue.get()) is not None:
                self._write_batch(item)
                self._idle.set()
        except BaseException as error:  # handed to the main thread, which raises it
            self._error = error
            self.data.stop()

    def _write_batch(self, item: _Finished) -> None:
        batch, started, made, pixels = item.batch, time.perf_counter(), 0, 0
        shard = self.data.opened[batch.shard.name]
        for position, attempt in enumerate(item.panoramas.attempts, batch.start):
            if position >= len(shard.settled):  # otherwise it was salvaged
                self._settle(shard, position, attempt)
                if attempt.image_HWC is not None:
                    made, pixels = made + 1, pixels + attempt.image_HWC[..., 0].size
        if made:
            self._rate.add(made)
            self._pixels.add(pixels)
        waited, self._waited = self._waited, 0.0
        seconds = {**item.panoramas.seconds, "write": time.perf_counter() - started, "wait": waited}
        shard.commit(seconds, self.data.cost(batch))
        if shard.complete:
            self._publish(shard)
        self.data.worker.beat(open={name: len(shard.settled) for name, shard in dict(self.data.opened).items()})

    def _measure(self) -> dict[str, Any]:
        """What every heartbeat says of this worker's speed, also while a batch takes longer than others did."""
        pixels = self._pixels.per_second()
        return {
            "samples": self._rate.total,
            "rate_per_s": self._rate.per_second(),
            "rate_error": self._rate.error(),
            "megapixels_per_s": None if pixels is None else pixels / 1e6,
            "memory_bytes": peak_memory(),
        }

    def _settle(self, shard: OpenShard, position: int, attempt: Attempt) -> None:
        task, output = shard.shard.tasks[position], self.job.output
        self._watch(failed=attempt.image_HWC is None and attempt.reason != UNSAFE)
        if attempt.image_HWC is None:
            shard.quarantine(position, attempt.reason or "unknown", attempt.detail)
            say(f"madgen: {task.key} is quarantined: {attempt.reason}: {attempt.detail}")
            return
        metadata = with_changes(sample_metadata(task, self.data.settings), attempt.changes)
        metadata = with_scores(metadata, self.data.pixel_scores(attempt.image_HWC))
        record = Record(task, attempt.image_HWC, metadata)
        shard.add(position, encode_sample(record, output.format, output.quality), metadata.get("scores"))
        self._tell("sample_written", record)

    def _watch(self, failed: bool) -> None:
        """A broken model must not burn a thousand GPU hours."""
        before = self._breaker.tripped
        self._breaker.record(failed)
        if self._breaker.tripped and before is None:
            self.data.stop()
            self._tell("tripped", self._breaker.tripped)

    def _publish(self, shard: OpenShard) -> None:
        published = shard.publish(lambda: self.data.worker.owns(shard.shard.name))
        del self.data.opened[shard.shard.name]
        self.data.worker.release(shard.shard.name)
        if published and self._uploads is not None:
            self._uploads.add(shard.shard.name)
        if published:
            self._tell("shard_published", ShardDone(shard.shard.name, shard.made, shard.seconds))

    def _tell(self, event: str, *arguments: Any) -> None:
        """Monitoring never stops a run: an observer that fails is named once and then left out."""
        for observer in self.observers:
            try:
                getattr(observer, event)(*arguments)
            except Exception as error:
                say(f"madgen: {type(observer).__name__} is off: {error!r}")
                self.observers = tuple(other for other in self.observers if other is not observer)
