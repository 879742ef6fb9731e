"""The DataModule: claims shards that are not done and yields their batches, until nothing is left to do."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from functools import cached_property

import lightning
from torch.utils.data import DataLoader, IterableDataset

from madgen.cluster.launch import place
from madgen.cluster.walltime import Walltime, job_end
from madgen.config.schema import Job, require_job
from madgen.dataset import manifest
from madgen.dataset.plan import batches, has_regions
from madgen.dataset.sample_json import sample_metadata, sample_settings
from madgen.dataset.shards.leases import Worker
from madgen.dataset.shards.recovery import reopen_quarantined, salvage
from madgen.dataset.shards.writer import OpenShard
from madgen.generation.batch_size import BatchSizes
from madgen.generation.scoring import PixelScores
from madgen.planning.cost import Evaluations, prompt_evaluations
from madgen.planning.forecast import view_costs
from madgen.planning.order import LOOK_AT, claim_order, shard_costs, turned
from madgen.planning.resolved_run import ResolvedRun
from madgen.types import Batch, Idle, Prompt
from madgen.utils.console import say

IDLE_S, LONGEST_IDLE_S = 0.5, 5.0
LONG_LIST = 100_000
"""Prompts that are read once and then shared with other workers; fewer take less than a second."""


class PromptDataModule(lightning.LightningDataModule):
    """Every process takes shards by exclusive claims, so any number of processes, jobs and nodes may share a dataset.

    Rank 0 of each job waits until all shards are done, and takes over those of workers that die; the other ranks end
    when nothing is left to claim, so a slow rank delays nobody.
    """

    def __init__(self, job: Job, run: ResolvedRun | None = None):
        super().__init__()
        self.job = require_job(job)
        self.run = run or ResolvedRun.of(job)
        self.plan, self.directory = self.run.plan, self.run.directory
        manifest.check_directory(self.directory, None, job.output.resume)
        self.worker = Worker(self.directory)
        self.stopping = threading.Event()
        self.opened: dict[str, OpenShard] = {}
        """The shards that this process has claimed and not yet published."""
        self.writing = False
        """A writer is at work on `opened`, and leaves them when it ends."""
        self.walltime = Walltime(None)
        self.out_of_time: str | None = None
        """Why no batch was started any more, if it was the time limit of the job."""
        self.was_there = self.directory.manifest.exists()
        """The dataset: what is missing of it then has disappeared."""
        self.finished = False
        """Nothing was left to do when this began."""

    def stop(self) -> None:
        """No batch is started after this; the one in flight ends."""
        self.stopping.set()

    def setup(self, stage: str) -> None:
        """Where all is done nobody loads a backbone; rank 0 decides, so that all processes do the same."""
        assert self.trainer is not None
        if self.job.retry == "quarantined" and self.trainer.is_global_zero and self.directory.manifest.exists():
            reopen_quarantined(self.directory)
        self.finished = self.trainer.strategy.broadcast(self.run.is_complete())
        self.walltime, self.out_of_time = Walltime(job_end()), None

    @cached_property
    def pixel_scores(self) -> PixelScores:
        """Of what the module samples, which has loaded its backbone by then."""
        assert self.trainer is not None
        return PixelScores(self.job, self.trainer.lightning_module.sampler)

    @cached_property
    def batch_sizes(self) -> BatchSizes:
        """As `pixel_scores`, of the module's sampler."""
        assert self.trainer is not None
        geometry, device = self.trainer.lightning_module.sampler.geometry, self.trainer.strategy.root_device
        return BatchSizes(self.job.sampling, geometry, device.type)

    def cost(self, batch: Batch) -> int:
        """View evaluations."""
        return sum(self.evaluations(task.prompt) for task in batch.tasks)

    def evaluations(self, prompt: Prompt) -> int:
        """View evaluations of one panorama."""
        return prompt_evaluations(self._evaluations, prompt)

    @cached_property
    def _evaluations(self) -> dict[tuple[int, int], Evaluations]:
        return view_costs(self.run)

    def took(self, batch: Batch, seconds: float) -> None:
        """A batch was sampled and decoded in so long."""
        if self.walltime.end is not None:
            self.walltime.record(self.cost(batch), seconds)

    def has_time(self, batch: Batch | Idle) -> bool:
        """Whether a batch can end before SLURM ends the job; if not, this process stops, and rank 0 says why."""
        if self.walltime.end is None:
            return True
        why = self.walltime.refuses(0 if isinstance(batch, Idle) else self.cost(batch))
        if why is not None:
            self.out_of_time = why
            self.stop()
            if self.trainer is None or self.trainer.global_rank == 0:
                say(f"madgen: {why}")
        return why is None

    def open(self) -> None:
        """Writes or checks `dataset.json` and begins to beat. The backbone is loaded by then, so it can all work."""
        assert self.trainer is not None
        device = self.trainer.strategy.root_device
        self.manifest = self.run.on(device.type).manifest
        self.settings = sample_settings(self.job, self.manifest)
        if self.was_there:
            self.directory.check_there()  # a disk may go while the backbone is loaded
        manifest.create(self.directory, self.manifest)
        self.was_there = True
        if (
            self.trainer.is_global_zero
            and len(self.plan.prompts) >= LONG_LIST
            and not (self.directory.plans / f"{self.plan.key}.arrow").exists()
        ):
            self.directory.make_in_work(self.directory.plans)
            self.plan.save(self.directory.plans)
        self.worker.start()
        self.worker.forget_dead_workers()
        self.worker.beat(rank=self.trainer.global_rank, device=str(device))

    def teardown(self, stage: str) -> None:
        """Gives back what was not published; the module can be used again."""
        self.leave()
        self.stopping.clear()

    def give_back(self) -> None:
        """Open shards are left to whoever claims them next."""
        for name, shard in self.opened.items():
            shard.leave()
            self.worker.release(name)
        self.opened.clear()

    def leave(self) -> None:
        """As `give_back`, and ends the heartbeat."""
        self.give_back()
        self.worker.close()

    def on_exception(self, exception: BaseException) -> None:
        """As `teardown`, which Lightning does not call then."""
        if not self.writing:
            self.leave()

    def predict_dataloader(self) -> DataLoader:
        """Unbatched: a Batch is made of one shard's tasks, cut at fixed positions."""
        self.open()
        return DataLoader(_Work(self), batch_size=None, num_workers=0)

    def work(self) -> Iterator[Batch | Idle]:
        """Batches of the shards that this process claims. Never blocks: Lightning asks for a batch ahead.

        A process that blocked here with its last batch still to run would wait for others that wait for it.
        """
        waits = self.trainer is None or self.trainer.global_rank == 0
        names = self.run.shard_names
        order, first, waited = self._order(), True, 0
        while not self.stopping.is_set():
            self.directory.check_there()
            taken = self.directory.done() | self.worker.claimed
            missing = [index for index in order if names[index] not in taken]
            index = self._claim(turned(missing, place()) if first else missing, names)
            first = False
            if index is not None:
                waited = 0
                yield from self._batches(index)
            elif missing and waits:
                self.worker.beat(state="waiting")
                waited += 1
                yield Idle(min(LONGEST_IDLE_S, IDLE_S * 1.2**waited) * random.uniform(0.8, 1.2))
            else:
                return

    def _order(self) -> list[int]:
        """The longest shards first; as they are numbered where all panoramas cost the same."""
        if len(set(self._evaluations.values())) == 1 and not has_regions(self.plan):
            return list(range(self.plan.shard_count))
        return claim_order(shard_costs(self.plan, self.evaluations))

    def _claim(self, missing: list[int], names: list[str]) -> int | None:
        """A shard that a dead worker left, or the first of `missing` that nobody works on; None if there is none."""
        claimed = self.worker.claimed_by_all()
        free = [index for index in missing if names[index] not in claimed]
        others = [index for index in missing if names[index] in claimed]  # of the living, and of the dead
        random.shuffle(others)
        for index in [*others[:LOOK_AT], *free, *others[LOOK_AT:]]:
            if self.stopping.is_set():
                return None
            if names[index] not in claimed and self.worker.claim(names[index]):
                return index
            if names[index] in claimed and self.worker.take_over(names[index]):
                self.worker.forget_dead_workers()
                return index
        return None

    def _batches(self, index: int) -> Iterator[Batch]:
        """The batches of a shard in which a sample is missing; an empty one if only publishing is left."""
        shard = self.plan.shard(index)
        retry = self.job.retry == "quarantined"
        found = salvage(
            self.directory, shard, lambda task: sample_metadata(task, self.settings), retry, self.pixel_scores
        )
        self.opened[shard.name] = OpenShard(self.directory, shard, self.worker.id, found)
        if len(found.kept) == len(shard.tasks):
            yield Batch(shard, len(shard.tasks), ())
        for batch in batches(shard, self.batch_sizes):
            if all(position in found.kept for position in range(batch.start, batch.start + len(batch.tasks))):
                continue
            if self.stopping.is_set():
                return
            self.worker.beat(state="working", shard=shard.name)
            yield batch


class _Work(IterableDataset):
    def __init__(self, module: PromptDataModule):
        self.module = module

    def __iter__(self) -> Iterator[Batch | Idle]:
        return self.module.work()
