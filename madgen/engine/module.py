"""The LightningModule: one batch of tasks in, their panoramas out."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import lightning
import numpy as np
import torch

from madgen.config import Job
from madgen.sampler import PanoramaSampler
from madgen.types import Batch, Idle


@dataclass(frozen=True)
class Panoramas:
    """What `predict_step` returns."""

    images_BHWC: np.ndarray
    """uint8, in the order of the batch's tasks."""
    seconds: dict[str, float]
    """Wall time of `sample` and `decode`."""


class PanoramaModule(lightning.LightningModule):
    """Samples on the device that the trainer gave to this process."""

    def __init__(self, job: Job):
        super().__init__()
        self.job = job
        self.sampler: PanoramaSampler | None = None

    def setup(self, stage: str) -> None:
        """Loads the backbone straight onto this process's device."""
        if self.sampler is None:
            self.sampler = PanoramaSampler.from_job(self.job, self.trainer.strategy.root_device)
            self.sampler.new_scheduler(
                self.job.sampling.num_inference_steps
            )  # refused here, before anything is written

    def transfer_batch_to_device(self, batch: Batch | Idle, device: torch.device, dataloader_idx: int) -> Batch | Idle:
        """Tasks are plain data; the sampler puts tensors where they belong."""
        return batch

    def predict_step(self, batch: Batch | Idle, batch_idx: int) -> Panoramas | None:
        """Panoramas of one batch; they depend on its tasks and the job alone."""
        if isinstance(batch, Idle):
            time.sleep(batch.seconds)
            return None
        if self.trainer.datamodule.stopping.is_set():  # Lightning had asked for this batch ahead
            return None
        assert self.sampler is not None
        sampling = self.job.sampling
        first = batch.tasks[0].prompt
        started = time.perf_counter()
        latents: Any = self.sampler.sample(
            [task.prompt.text for task in batch.tasks],
            negative_prompts=[task.prompt.negative for task in batch.tasks],
            height=first.height,
            width=first.width,
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            seeds=[task.seed for task in batch.tasks],
            loop=sampling.loop,
            regions=[task.prompt.regions for task in batch.tasks],
            output="latent",
        )
        if latents.is_cuda:
            torch.cuda.synchronize(latents.device)
        sampled = time.perf_counter()
        images = self.sampler.decode(latents, sampling.loop, sampling.decode)
        return Panoramas(images, {"sample": sampled - started, "decode": time.perf_counter() - sampled})
