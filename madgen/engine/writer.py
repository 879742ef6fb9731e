"""The ShardWriter callback: encodes and writes beside the sampling, with a bounded queue, and publishes shards."""

from __future__ import annotations

import queue
import signal
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

import lightning
from lightning import LightningModule, Trainer

from madgen.config import Job
from madgen.dataset.layout import DatasetDir
from madgen.dataset.shard import OpenShard
from madgen.engine.datamodule import PromptDataModule
from madgen.engine.module import Panoramas
from madgen.engine.signals import StopSignals
from madgen.masks import region_to_json
from madgen.monitor.observer import Observer, ShardDone
from madgen.monitor.rate import Rate
from madgen.types import Batch, Idle, Record

QUEUE_BATCHES = 2
"""Batches that may wait to be encoded: bounds the memory, hides the encoding behind the next batch's sampling."""


@dataclass(frozen=True)
class _Finished:
    batch: Batch
    panoramas: Panoramas


class ShardWriter(lightning.Callback):
    """Writes what `PanoramaModule` samples for the batches of a `PromptDataModule`.

    On the first process (global rank 0) the `observers` are told of it.
    """

    def __init__(self, job: Job, observers: tuple[Observer, ...] = ()):
        self.job, self.observers = job, observers
        self.directory = DatasetDir(job.output_dir)
        self.signals = StopSignals()
        self._queue: queue.Queue[_Finished | None] = queue.Queue(QUEUE_BATCHES)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._open: dict[str, OpenShard] = {}
        self._waited = 0.0
        self._rate = Rate()

    @property
    def written(self) -> int:
        """Panoramas that this process made."""
        return self._rate.total

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes over the signals and starts the thread that writes."""
        self.data: PromptDataModule = trainer.datamodule
        self.metadata = sample_settings(self.job, self.data.manifest)
        self.signals.install(lambda: self._stop(trainer))
        if trainer.global_rank != 0:
            self.observers = ()
        self._tell("started", self.directory, self.data.worker, self.data.manifest)
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
        """Hands the batch over; waits only when the queue is full."""
        if isinstance(batch, Idle) or outputs is None:
            return
        waiting = time.perf_counter()
        self._put(_Finished(batch, outputs))
        self._waited += time.perf_counter() - waiting

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes what is left, then raises what went wrong, if anything did."""
        self._put(None)
        self.close()
        if self._error is not None:
            raise self._error

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Sampling failed: what was finished before is still written."""
        if self._thread is not None and self._error is None:
            self._put(None)
        self.close()

    def close(self) -> None:
        """Ends the writing thread; unfinished shards and claims are given back."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            for shard in self._open.values():
                shard.discard()
            self._open.clear()
            self.data.worker.close()
            self._tell("stopped")
        self.signals.restore()

    def _stop(self, trainer: Trainer) -> None:
        """No further batch here, nor in the processes that this one has started."""
        self.data.stop()
        if trainer.strategy.launcher is not None and getattr(trainer.strategy.launcher, "procs", None):
            trainer.strategy.launcher.kill(signal.SIGTERM)

    def _put(self, item: _Finished | None) -> None:
        """Never blocks on a writer that has died."""
        while self._error is None:
            try:
                return self._queue.put(item, timeout=0.5)
            except queue.Full:
                continue
        if item is not None:
            self.data.stop()
        return None

    def _write(self) -> None:
        try:
            while (item := self._queue.get()) is not None:
                self._write_batch(item)
        except BaseException as error:  # handed to the main thread, which raises it
            self._error = error
            self.data.stop()

    def _write_batch(self, item: _Finished) -> None:
        batch, started = item.batch, time.perf_counter()
        shard = self._open.get(batch.shard.name)
        if shard is None:
            output = self.job.output
            shard = OpenShard(self.directory, batch.shard, self.data.worker.id, output.format, output.quality)
            self._open[batch.shard.name] = shard
        for task, image in zip(batch.tasks, item.panoramas.images_BHWC, strict=True):
            record = Record(task, image, sample_metadata(task, self.metadata))
            shard.add(record)
            self._tell("sample_written", record)
        shard.add_seconds({**item.panoramas.seconds, "write": time.perf_counter() - started, "wait": self._waited})
        self._waited = 0.0
        self._rate.add(len(batch.tasks))
        if batch.is_last:
            self._publish(shard)
        self.data.worker.beat(
            samples=self._rate.total,
            open={name: len(shard.written) for name, shard in self._open.items()},
            rate_per_s=self._rate.per_second(),
        )

    def _publish(self, shard: OpenShard) -> None:
        published = shard.publish()
        del self._open[shard.shard.name]
        self.data.worker.release(shard.shard.name)
        if published:
            self._tell("shard_published", ShardDone(shard.shard.name, len(shard.written), shard.seconds))

    def _tell(self, event: str, *arguments: Any) -> None:
        """Monitoring never stops a run: an observer that fails is named once and then left out."""
        for observer in self.observers:
            try:
                getattr(observer, event)(*arguments)
            except Exception as error:
                print(f"madgen: {type(observer).__name__} is off: {error!r}", file=sys.stderr)
                self.observers = tuple(other for other in self.observers if other is not observer)


def sample_settings(job: Job, content: dict[str, Any]) -> dict[str, Any]:
    """The part of a sample's JSON that all samples of a job share."""
    identity, backbone = content["identity"], job.backbone
    where = {"pretrained": backbone.pretrained, "revision": backbone.revision, "config": backbone.config}
    known = zip(backbone.loras, identity["backbone"]["loras"], strict=True)
    return {
        "backbone": {
            **where,
            **identity["backbone"],
            "loras": [{"weights": lora.weights, **entry} for lora, entry in known],
        },
        "method": identity["method"],
        "sampling": identity["sampling"],
        "job_seed": job.prompts.seed,
        "fingerprint": content["fingerprint"],
    }


def sample_metadata(task: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Everything needed to make one sample again."""
    prompt = task.prompt
    return {
        "key": task.key,
        "prompt_id": prompt.id,
        "sample_index": task.sample_index,
        "prompt": prompt.text,
        "negative_prompt": prompt.negative,
        "seed": task.seed,
        "height": prompt.height,
        "width": prompt.width,
        **({"regions": [region_to_json(region) for region in prompt.regions]} if prompt.regions else {}),
        **settings,
    }
