"""The DataModule: claims shards that are not done and yields their batches, until nothing is left to do."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import lightning
from torch.utils.data import DataLoader, IterableDataset

from madgen.config import Job
from madgen.dataset import manifest
from madgen.dataset.claim import Worker
from madgen.dataset.layout import DatasetDir
from madgen.plan.shards import Plan, batches, build_plan, shard_name
from madgen.types import Batch, Idle

IDLE_S = 0.5


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
        manifest.check_directory(self.directory, None, job.output.resume)
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
        manifest.create(self.directory, self.manifest)
        self.worker.start()
        self.worker.forget_dead_workers()
        self.worker.beat(rank=self.trainer.global_rank, device=str(device))

    def teardown(self, stage: str) -> None:
        """Gives back what was not published; the module can be used again."""
        self.worker.close()
        self.stopping.clear()

    def on_exception(self, exception: BaseException) -> None:
        """As `teardown`, which Lightning does not call then."""
        self.worker.close()

    def predict_dataloader(self) -> DataLoader:
        """Unbatched: a Batch is made of one shard's tasks, cut at fixed positions."""
        self.open()
        return DataLoader(_Work(self), batch_size=None, num_workers=0)

    def work(self) -> Iterator[Batch | Idle]:
        """Batches of the shards that this process claims. Never blocks: Lightning asks for a batch ahead.

        A process that blocked here with its last batch still to run would wait for others that wait for it.
        """
        waits = self.trainer is None or self.trainer.global_rank == 0
        while not self.stopping.is_set():
            taken = self.directory.done() | self.worker.claimed
            names = [shard_name(self.plan.name, index) for index in range(self.plan.shard_count)]
            missing = [index for index, name in enumerate(names) if name not in taken]
            claimed = False
            for index in missing:
                if not self.stopping.is_set() and self.worker.claim(names[index]):
                    claimed = True
                    yield from self._batches(index)
            if not claimed and not (missing and waits):
                return
            if not claimed:
                self.worker.beat(state="waiting")
                yield Idle(IDLE_S)

    def _batches(self, index: int) -> Iterator[Batch]:
        for batch in batches(self.plan.shard(index), self.job.sampling.batch_size):
            if self.stopping.is_set():
                return
            self.worker.beat(state="working", shard=batch.shard.name)
            yield batch


class _Work(IterableDataset):
    def __init__(self, module: PromptDataModule):
        self.module = module

    def __iter__(self) -> Iterator[Batch | Idle]:
        return self.module.work()
