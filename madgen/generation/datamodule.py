"""The LightningDataModule: the work queue as a dataloader."""

from __future__ import annotations

import lightning

from madgen.config.schema import Job, require_job
from madgen.dataset import manifest
from madgen.dataset.shards.recovery import reopen_quarantined
from madgen.generation.work_queue import WorkQueue
from madgen.planning.resolved_run import ResolvedRun


class PromptDataModule(lightning.LightningDataModule):
    """Yield the batches of a job that are missing on disk; see `WorkQueue`."""

    def __init__(self, job: Job, run: ResolvedRun | None = None):
        super().__init__()
        self.job = require_job(job)
        self.run = run or ResolvedRun.of(job)
        manifest.check_directory(self.run.directory, None, job.output.resume)
        self.queue = WorkQueue(self.run)
        self.finished = False
        """True if nothing is left to do, so that no backbone is loaded."""

    def setup(self, stage: str) -> None:
        """Find out whether anything is left to do; rank 0 decides, so that all processes do the same."""
        assert self.trainer is not None
        directory = self.run.directory
        if self.job.retry == "quarantined" and self.trainer.is_global_zero and directory.manifest.exists():
            reopen_quarantined(directory)
        self.finished = self.trainer.strategy.broadcast(self.run.is_complete())

    def predict_dataloader(self) -> WorkQueue:
        """Return the queue, whose items are whole batches."""
        assert self.trainer is not None
        self.queue.start(self.trainer.global_rank, str(self.trainer.strategy.root_device))
        return self.queue

    def teardown(self, stage: str) -> None:
        """Release what was not published; the module can be used again."""
        self.queue.close()
        self.queue.stopping = False

    def on_exception(self, exception: BaseException) -> None:
        """Release what was not published: Lightning does not call `teardown` after an error."""
        self.queue.close()
