"""The DataModule: claims shards that are not done and yields their batches, until nothing is left to do."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import lightning
from torch.utils.data import DataLoader, IterableDataset

from madgen.config import Job
from madgen.dataset import manifest
from madgen.dataset.claim import Worker
from madgen.dataset.layout import DatasetDir
from madgen.plan.shards import Plan, batches, build_plan
from madgen.types import Batch, Shard

POLL_S = 1.0


class PromptDataModule(lightning.LightningDataModule):
    """Every process takes shards by exclusive claims, so any number of processes, jobs and nodes may share a dataset.

    Rank 0 of each job waits until all shards are done, and takes over those of workers that die; the other ranks end
    when nothing is left to claim, so a slow rank delays nobody.
    """

    def __init__(self, job: Job, plan: Plan | None = None):
        super().__init__()
        self.job = job
        self.plan = plan or build_plan(job)
        self.directory = DatasetDir(job.output_dir)
        self.worker = Worker(self.directory)
        self.stopping = threading.Event()

    def stop(self) -> None:
        """No batch is started after this; the one in flight ends."""
        self.stopping.set()

    def open(self) -> None:
        """Writes or checks `dataset.json` and begins to beat. The backbone is loaded by then, so it can all work."""
        assert self.trainer is not None
        device = self.trainer.strategy.root_device
        self.manifest = manifest.build(self.job, self.plan, device.type)
        manifest.check_directory(self.directory, self.manifest["identity"], self.job.output.resume)
        manifest.create(self.directory, self.manifest)
        self.worker.start()
        self.worker.forget_dead_workers()
        self.worker.beat(rank=self.trainer.global_rank, device=str(device))

    def predict_dataloader(self) -> DataLoader:
        """Unbatched: a Batch is made of one shard's tasks, cut at fixed positions."""
        self.open()
        return DataLoader(_Batches(self), batch_size=None, num_workers=0)

    def shards(self) -> Iterator[Shard]:
        """Shards claimed by this process, one at a time, as long as there are any."""
        waits = self.trainer is None or self.trainer.global_rank == 0
        while not self.stopping.is_set():
            done = self.directory.done()
            missing = [index for index in range(self.plan.shard_count) if self._name(index) not in done]
            claimed_any = False
            for index in missing:
                if self.stopping.is_set():
                    return
                if self._name(index) not in self.worker.claimed and self.worker.claim(self._name(index)):
                    claimed_any = True
                    yield self.plan.shard(index)
            others = [index for index in missing if self._name(index) not in self.worker.claimed]
            if not claimed_any and (not others or not waits):
                return
            if not claimed_any:
                self.worker.beat(state="waiting")
                self.stopping.wait(POLL_S)

    def _name(self, index: int) -> str:
        return f"{self.plan.name}-{index:06d}"


class _Batches(IterableDataset):
    def __init__(self, module: PromptDataModule):
        self.module = module

    def __iter__(self) -> Iterator[Batch]:
        for shard in self.module.shards():
            for batch in batches(shard, self.module.job.sampling.batch_size):
                if self.module.stopping.is_set():
                    return
                self.module.worker.beat(state="working", shard=shard.name, time_of_batch=time.time())
                yield batch
