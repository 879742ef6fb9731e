"""The LightningModule: one batch of tasks in, their panoramas out."""

from __future__ import annotations

import time
from dataclasses import dataclass

import lightning
import torch

from madgen.config.schema import Job, require_job
from madgen.generation.robust_sampler import Attempts
from madgen.generation.safety import Safety
from madgen.generation.scoring import ClipScore
from madgen.hub.weights import weight_files
from madgen.sampling.sampler import PanoramaSampler
from madgen.types import Attempt, Batch, Idle
from madgen.utils.console import say
from madgen.utils.node_cache import fetch_ahead


@dataclass(frozen=True)
class Panoramas:
    """What `predict_step` returns."""

    attempts: tuple[Attempt, ...]
    """In the order of the batch's tasks."""
    seconds: dict[str, float]
    """Wall time of `sample`, `decode` and, where there is a checker or CLIP, `safety` and `score`."""


class PanoramaModule(lightning.LightningModule):
    """Samples on the device that the trainer gave to this process."""

    def __init__(self, job: Job):
        super().__init__()
        self.job = require_job(job)
        self.sampler: PanoramaSampler | None = None
        self.attempts: Attempts | None = None

    def setup(self, stage: str) -> None:
        """Loads the backbone straight onto this process's device."""
        if getattr(self.trainer.datamodule, "finished", False):
            return
        if self.sampler is None:
            backbone = self.job.backbone
            if backbone.compile and self.trainer.is_global_zero:
                say("madgen: the first panoramas of each size wait until their kernels are compiled, a minute or more")
            fetch_ahead(weight_files(backbone.pretrained, backbone.revision, backbone.variant))
            self.sampler = PanoramaSampler.from_job(self.job, self.trainer.strategy.root_device)
            self.sampler.new_scheduler(
                self.job.sampling.num_inference_steps
            )  # refused here, before anything is written
            safety = Safety.load(self.job.safety, self.sampler)
            clip = ClipScore.load(self.job.scores.clip, self.sampler)
            self.attempts = Attempts(self.sampler, self.job.sampling, safety, clip)

    def transfer_batch_to_device(self, batch: Batch | Idle, device: torch.device, dataloader_idx: int) -> Batch | Idle:
        """Tasks are plain data; the sampler puts tensors where they belong."""
        return batch

    def predict_step(self, batch: Batch | Idle, batch_idx: int) -> Panoramas | None:
        """Panoramas of one batch; they depend on its tasks and the job alone."""
        data = self.trainer.datamodule
        if data.stopping.is_set() or not data.has_time(batch):  # Lightning had asked for this batch ahead
            return None
        if isinstance(batch, Idle):
            time.sleep(batch.seconds)
            return None
        if not batch.tasks:
            return Panoramas((), {})
        assert self.attempts is not None
        started = time.monotonic()
        panoramas = Panoramas(self.attempts(batch.tasks), self.attempts.seconds)
        data.took(batch, time.monotonic() - started)
        return panoramas
