"""Lightning callback that hands sampled batches to the shard pipeline, and stops the run on signals."""

from __future__ import annotations

import signal
from typing import Any

import lightning
from lightning import LightningModule, Trainer

from madgen.cluster.signals import StopSignals
from madgen.config.schema import Job, require_job
from madgen.generation.shard_pipeline import ShardPipeline
from madgen.monitoring.observer import Observer
from madgen.types import Batch, Panoramas
from madgen.utils.errors import UserError


class ShardWriter(lightning.Callback):
    """Write what `PanoramaModule` samples for the batches of a `PromptDataModule`; see `ShardPipeline`.

    The `observers` are called on the first process (global rank 0).
    """

    def __init__(self, job: Job, observers: tuple[Observer, ...] = ()):
        self.job = job
        self._previous: Panoramas | None = None
        self.pipeline = ShardPipeline(require_job(job), observers)
        self.signals = StopSignals()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raise UserError unless the trainer's data module has the job of this callback."""
        data = getattr(trainer, "datamodule", None)
        if getattr(data, "job", None) != self.job:
            raise UserError(
                "ShardWriter needs trainer.predict(..., datamodule=PromptDataModule(job)) with the same job"
            )

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the signal handlers and start to write."""
        self.signals.install(lambda: self._stop(trainer))
        if trainer.global_rank != 0:
            self.pipeline.observers = []
        self.pipeline.start(trainer.datamodule.queue)
        if (sampler := getattr(pl_module, "attempts", None)) is not None and self.pipeline.observers:
            sampler.on_step = self.pipeline.step_done

    def on_predict_batch_start(self, *arguments: Any) -> None:
        """Drop the images of the previous batch, which Lightning may keep with its predictions."""
        if self._previous is not None:
            self._previous.without_images()
            self._previous = None

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Panoramas,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Hand the batch over once the previous one is written."""
        self.pipeline.put(batch, Panoramas(outputs.attempts, outputs.seconds))
        self._previous = outputs

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last batch. Raises the error if writing failed."""
        self.on_predict_batch_start()
        self.pipeline.finish(self.signals.preempting)
        self.signals.restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what was sampled before an error."""
        self.pipeline.abort(self.signals.preempting)
        self.signals.restore()

    def _stop(self, trainer: Trainer) -> None:
        """Start no further batch here, nor in the processes that this one has launched."""
        trainer.datamodule.queue.stop()
        if getattr(trainer.strategy.launcher, "procs", None):
            trainer.strategy.launcher.kill(signal.SIGTERM)
