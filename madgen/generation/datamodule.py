"""LightningDataModule that yields the batches of the work queue."""

from __future__ import annotations

import lightning
import torch

from madgen.config.schema import Job, require_job
from madgen.dataset import manifest
from madgen.dataset.shards.recovery import reopen_quarantined
from madgen.generation.work_queue import PlannedBatches, WorkQueue
from madgen.generation.writer import ShardWriter
from madgen.planning.resolved_run import ResolvedRun
from madgen.types import Batch


class PromptDataModule(lightning.LightningDataModule):
    """Yield the batches of a job.

    With a ShardWriter among the trainer's callbacks: those that are missing on disk, see `WorkQueue`. Without one, all
    batches of the job, divided among the processes; then nothing is written.
    """

    def __init__(self, job: Job, run: ResolvedRun | None = None):
        super().__init__()
        self.job = require_job(job)
        self.run = run or ResolvedRun.of(job)
        self.queue = WorkQueue(self.run)
        self.writes = False
        """True if a ShardWriter writes the samples."""
        self.finished = False
        """True if nothing is left to do, so that no backbone is loaded."""

    def setup(self, stage: str) -> None:
        """Find out whether anything is left to do; rank 0 decides, so that all processes do the same.

        Raises UserError if the directory holds another dataset.
        """
        assert self.trainer is not None
        directory = self.run.directory
        self.writes = any(isinstance(callback, ShardWriter) for callback in self.trainer.callbacks)
        if not self.writes:
            self.finished = False
            return
        manifest.check_directory(directory, None, self.job.output.resume)
        if self.job.retry == "quarantined" and self.trainer.is_global_zero and directory.manifest.exists():
            reopen_quarantined(directory, set(self.run.shard_names))
        self.finished = self.trainer.strategy.broadcast(self.run.is_complete())

    def predict_dataloader(self) -> WorkQueue | PlannedBatches:
        """Return an iterable of whole batches."""
        assert self.trainer is not None
        device = str(self.trainer.strategy.root_device)
        if not self.writes:
            run = self.run.on(device.partition(":")[0])
            return PlannedBatches(run, self.trainer.global_rank, self.trainer.world_size)
        self.queue.start(self.trainer.global_rank, device)
        return self.queue

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Return the batch unchanged: it holds no tensors."""
        return batch

    def teardown(self, stage: str) -> None:
        """Release unpublished shards; the module can be used again."""
        self.queue.close()
        self.queue.stopping = False

    def on_exception(self, exception: BaseException) -> None:
        """Release unpublished shards: Lightning does not call `teardown` after an error."""
        self.queue.close()
