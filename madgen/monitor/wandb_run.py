"""Weights & Biases: one run a dataset, logged by one process; offline unless asked otherwise.

The run's own step restarts when an offline run is resumed, so every point carries `samples` as its x axis.
"""

from __future__ import annotations

import hashlib
import time
from typing import Any

import numpy as np
import wandb
from PIL import Image

from madgen.dataset.claim import Worker
from madgen.dataset.layout import DatasetDir
from madgen.monitor.observer import Observer, ShardDone
from madgen.monitor.rate import Rate
from madgen.monitor.status import count_done, made
from madgen.schema import Job
from madgen.types import Record

LOG_EVERY_S = 5.0
THUMBNAIL_HEIGHT = 128  # pixels


class WandbRun(Observer):
    """Throughput, progress and previews of a dataset."""

    def __init__(self, job: Job):
        self.job, self.config = job, job.monitor.wandb
        self.rate, self.megapixels = Rate(), Rate()
        self.seen, self.due, self.seconds = 0, 0.0, dict[str, float]()

    def started(self, directory: DatasetDir, worker: Worker, manifest: dict[str, Any]) -> None:
        self.directory, self.planned = directory, manifest["plan"]["samples"]
        self.run = wandb.init(
            project=self.config.project,
            entity=self.config.entity,
            group=self.config.group,
            id=self.config.id or run_id(directory, manifest["fingerprint"]),
            name=manifest["job"]["name"],
            mode=self.config.mode,
            resume="allow",
            config={**manifest["job"], "fingerprint": manifest["fingerprint"], "plan": manifest["plan"]},
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
        )
        self.run.define_metric("samples")
        self.run.define_metric("*", step_metric="samples")

    def sample_written(self, record: Record) -> None:
        self.rate.add(1)
        self.megapixels.add(record.image_HWC.shape[0] * record.image_HWC.shape[1])
        every = self.job.monitor.preview_every
        preview = every > 0 and self.seen % every == 0
        self.seen += 1
        if preview:
            picture = thumbnail(record.image_HWC)
            self._log({"preview": wandb.Image(picture, caption=f"{record.task.key}: {record.task.prompt.text}")})
        elif time.monotonic() >= self.due:
            self._log({})

    def shard_published(self, shard: ShardDone) -> None:
        for name, seconds in shard.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        total = sum(self.seconds.values()) or 1.0
        self._log({f"time_share/{name}": seconds / total for name, seconds in self.seconds.items()})

    def _log(self, values: dict[str, Any]) -> None:
        self.due = time.monotonic() + LOG_EVERY_S
        samples = made(self.directory)
        rates = {"panoramas_per_s": self.rate.per_second(), "megapixels_per_s": self.megapixels.per_second()}
        if rates["megapixels_per_s"] is not None:
            rates["megapixels_per_s"] /= 1e6
        known = {name: rate for name, rate in rates.items() if rate is not None}
        self.run.log({"samples": samples, "progress": samples / self.planned, **known, **values})

    def preempted(self) -> None:
        self.run.mark_preempting()

    def stopped(self) -> None:
        self.run.summary["samples"] = count_done(self.directory)
        self.run.finish()


def run_id(directory: DatasetDir, fingerprint: str) -> str:
    """One id a dataset: the same after every restart."""
    text = f"{directory.root.resolve()}/{fingerprint}"
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def thumbnail(image_HWC: np.ndarray) -> Image.Image:
    """A picture of at most 128 px height."""
    image = Image.fromarray(image_HWC)
    if image.height <= THUMBNAIL_HEIGHT:
        return image
    return image.resize((max(1, image.width * THUMBNAIL_HEIGHT // image.height), THUMBNAIL_HEIGHT))
