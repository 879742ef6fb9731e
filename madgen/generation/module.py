"""The LightningModule: a batch of tasks in, their panoramas out."""

from __future__ import annotations

import logging

import lightning
import torch

from madgen.config.schema import Job, require_job
from madgen.generation.robust_sampler import RobustSampler
from madgen.generation.safety import Safety
from madgen.generation.scoring import ClipScore
from madgen.sampling.sampler import PanoramaSampler
from madgen.types import Batch, Panoramas

logger = logging.getLogger(__name__)


class PanoramaModule(lightning.LightningModule):
    """Sample on the device that the trainer gave to this process."""

    def __init__(self, job: Job):
        super().__init__()
        self.job = require_job(job)
        self.attempts: RobustSampler | None = None

    def setup(self, stage: str) -> None:
        """Load the backbone straight onto this process's device, unless nothing is left to do."""
        if self.attempts is None and not getattr(self.trainer.datamodule, "finished", False):
            if self.job.backbone.compile and self.trainer.is_global_zero:
                logger.warning("compiling kernels for the first panoramas of each size takes a minute or more")
            self.attempts = load(self.job, self.trainer.strategy.root_device)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Return the batch unchanged: it holds no tensors."""
        return batch

    def predict_step(self, batch: Batch, batch_idx: int) -> Panoramas:
        """Sample the panoramas of a batch; they depend on its tasks and the job alone."""
        if not batch.tasks:
            return Panoramas((), {})
        assert self.attempts is not None
        return Panoramas(self.attempts(batch.tasks), self.attempts.seconds)


def load(job: Job, device: torch.device) -> RobustSampler:
    """Load a job's models. Raises UserError if they do not fit the job, before anything is written."""
    sampler = PanoramaSampler.from_job(job, device)
    sampler.new_scheduler(job.sampling.num_inference_steps)  # raises for settings it cannot take
    safety, clip = Safety.load(job.safety, sampler), ClipScore.load(job.scores.clip, sampler)
    return RobustSampler(sampler, safety=safety, clip=clip)
