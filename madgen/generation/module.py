"""LightningModule that samples the panoramas of batches of tasks."""

from __future__ import annotations

import logging
from functools import partial

import lightning
import torch

from madgen.config.schema import Job, require_job
from madgen.generation.datamodule import PromptDataModule
from madgen.generation.robust_sampler import RobustSampler
from madgen.generation.safety import Safety
from madgen.generation.scoring import clip_score
from madgen.models.clip import load as load_clip
from madgen.planning.gpu_memory import check_weights
from madgen.sampling.sampler import PanoramaSampler
from madgen.types import Batch, Panoramas
from madgen.utils.errors import UserError

logger = logging.getLogger(__name__)


class PanoramaModule(lightning.LightningModule):
    """Sample on the device that the trainer gave to this process.

    `trainer.predict` returns one `Panoramas` for each batch: keys, prompts, seeds and images. With a ShardWriter the
    images go to the shards, and predictions keep the path of the shard instead.
    """

    def __init__(self, job: Job):
        super().__init__()
        self.job = require_job(job)
        self.attempts: RobustSampler | None = None
        self._shard: str | None = None
        """Shard of the previous batch."""

    def setup(self, stage: str) -> None:
        """Load the backbone straight onto this process's device, unless nothing is left to do.

        Raises UserError if the trainer or its data module does not fit the job.
        """
        self._check_trainer()
        if self.attempts is None and not getattr(self.trainer.datamodule, "finished", False):
            if self.job.backbone.compile and self.trainer.is_global_zero:
                logger.warning("compiling kernels for the first panoramas of each size takes a minute or more")
            self.attempts = load(self.job, self.trainer.strategy.root_device)

    def predict_step(self, batch: Batch, batch_idx: int) -> Panoramas:
        """Sample the panoramas of a batch; they depend on its tasks and the job alone."""
        data = self.trainer.datamodule
        shard = str(data.run.directory.tar(batch.shard.name)) if data.writes else None
        if not batch.tasks:
            return Panoramas((), {}, (), shard)
        assert self.attempts is not None
        if batch.shard.name != self._shard:
            self._shard = batch.shard.name
            self.attempts.keep_prompts(batch.shard.tasks[batch.start :])
        return Panoramas(self.attempts(batch.tasks), self.attempts.seconds, batch.tasks, shard)

    def _check_trainer(self) -> None:
        data, precision = getattr(self.trainer, "datamodule", None), self.trainer.precision
        if not isinstance(data, PromptDataModule):
            raise UserError("PanoramaModule needs trainer.predict(module, datamodule=PromptDataModule(job))")
        if data.job != self.job:
            raise UserError("PanoramaModule and PromptDataModule have different jobs; pass both the same job")
        if precision not in ("32-true", "32", 32):
            raise UserError(
                f"Trainer(precision={precision!r}) would change the computation of the job; set backbone.dtype instead"
            )


def load(job: Job, device: torch.device) -> RobustSampler:
    """Load a job's models. Raises UserError if they do not fit the job, before anything is written."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        check_weights(job.backbone, properties.name, properties.total_memory)
    sampler = PanoramaSampler.from_job(job, device)
    sampler.new_scheduler(job.sampling.num_inference_steps)  # raises for settings it cannot take
    safety, model = Safety.load(job.safety, sampler), job.scores.clip
    clip = None if model is None else partial(clip_score, load_clip(model, sampler.device))
    return RobustSampler(sampler, safety=safety, clip=clip)
