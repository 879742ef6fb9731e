"""Lease the shards of a dataset that one process generates, and cut them into batches. Independent of Lightning."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator
from functools import cached_property
from itertools import islice

from madgen.cluster.launch import worker_number
from madgen.cluster.walltime import Walltime, job_end
from madgen.dataset import manifest
from madgen.dataset.format import Manifest
from madgen.dataset.plan import batches, has_regions
from madgen.dataset.shards.leases import Worker
from madgen.dataset.shards.recovery import salvage
from madgen.dataset.shards.writer import OpenShard
from madgen.generation.batch_size import BatchSizes
from madgen.generation.environment import environment
from madgen.planning.cost import prompt_evaluations
from madgen.planning.order import LEASES_CHECKED, claim_order, rotated, shard_costs
from madgen.planning.resolved_run import ResolvedRun
from madgen.planning.shapes import Shapes
from madgen.types import Batch, Prompt

logger = logging.getLogger(__name__)

MIN_WAIT_S, MAX_WAIT_S = 0.5, 5.0
"""Interval in seconds at which the disk is checked while other workers hold all leases."""
EXTENSION = "extension"
"""Lease of the process that adds a generation to `dataset.json`."""


class WorkQueue:
    """Iterate over the batches that are missing in the shards that this process leases.

    Any number of processes, jobs and nodes may share a dataset. Rank 0 of each job ends when all shards are done, and
    takes over those of workers that die; the other ranks end when no shard is free, so a slow rank delays nobody.
    """

    def __init__(self, run: ResolvedRun):
        self.run, self.rank = run, 0
        self.worker = Worker(run.directory)
        self.open_shards: dict[str, OpenShard] = {}
        """Leased shards by name, until they are published."""
        self.resumes = run.directory.manifest.exists()
        """True once the dataset exists: files that are missing afterwards were lost."""
        self.stopping = False
        self._device = "cpu"
        self.out_of_time: str | None = None
        """Reason why no further batch was started, if the job's time limit is near."""
        self._walltime = Walltime(None)

    def start(self, rank: int, device: str) -> None:
        """Write or check `dataset.json`, then start the heartbeat; call it when the weights are loaded."""
        self.run, self.rank = self.run.on(device.partition(":")[0]), rank
        self.out_of_time, self._walltime = None, Walltime(job_end())
        directory, plan = self.run.directory, self.run.plan
        content = self.run.manifest
        if self.resumes:
            directory.check_there()  # a disk may disappear while the backbone is loaded
        manifest.create(directory, content, self.run.job.output.resume)
        self.resumes = True
        self.worker.start()
        self._extend(content)
        if rank == 0 and plan.key and not (directory.plans / f"{plan.key}.arrow").exists():
            directory.make_in_work(directory.plans)
            plan.save(directory.plans)
        self.worker.forget_dead_workers()
        self._device = device
        self.worker.beat(rank=rank, device=device)

    def _extend(self, content: Manifest) -> None:
        """Add the next generation to `dataset.json` if this run has one; of concurrent workers one does so."""
        directory = self.run.directory
        if not self.run.added:
            return
        while manifest.extends(directory.read_manifest(), content):
            if self.worker.claim(EXTENSION):
                manifest.extend(directory, content)
                self.worker.release(EXTENSION)
            else:
                time.sleep(MIN_WAIT_S)
        manifest.check_directory(directory, content, self.run.job.output.resume)

    def stop(self) -> None:
        """Start no further batch; the one in flight is finished. Safe to call from a signal handler."""
        self.stopping = True

    def __len__(self) -> int:
        """Return an upper bound. Lightning fetches one batch ahead from an iterable without a length.

        Waiting for other workers would then be a deadlock: they may wait for the batch that was fetched and not run.
        """
        return self.run.plan.samples + self.run.plan.shard_count

    def __iter__(self) -> Iterator[Batch]:
        for shard in self._leases():
            for batch in self._missing_batches(shard):
                cost = self.cost(batch)
                if not self._may_start(cost):
                    return
                self.worker.beat(state="working", shard=shard.shard.name)
                started = time.monotonic()
                yield batch
                self._walltime.record(cost, time.monotonic() - started)

    def cost(self, batch: Batch) -> int:
        """Return the view evaluations of a batch."""
        return sum(self._evaluations(task.prompt) for task in batch.tasks)

    def publish(self, shard: OpenShard) -> bool:
        """Move a complete shard to its final name and release it; False if another worker has taken it over."""
        name = shard.shard.name
        published = shard.publish(lambda: self.worker.owns(name))
        del self.open_shards[name]
        self.worker.release(name)
        return published

    def release_shards(self) -> None:
        """Leave unfinished shards to the workers that lease them next."""
        for name, shard in self.open_shards.items():
            shard.leave()
            self.worker.release(name)
        self.open_shards.clear()

    def close(self) -> None:
        """Release all shards and end the heartbeat. May be called again."""
        self.release_shards()
        self.worker.close()

    def _may_start(self, cost: int) -> bool:
        """Return whether a batch of `cost` may start; if it could not end in time, this process stops."""
        if not self.stopping and (reason := self._walltime.refuses(cost)) is not None:
            self.out_of_time = reason
            self.stop()
            if self.rank == 0:
                logger.warning(reason)
        return not self.stopping

    def _leases(self) -> Iterator[OpenShard]:
        """Open shards that nobody else works on, until none is left; rank 0 waits for those of others."""
        directory, names, order = self.run.directory, self.run.shard_names, self._order()
        first, waits = True, 0
        while self._may_start(0):
            directory.check_there()
            taken = directory.done() | self.worker.claimed
            missing = [index for index in order if names[index] not in taken]
            index = self._lease(rotated(missing, worker_number()) if first else missing)
            first = False
            if index is not None:
                waits = 0
                yield self._open(index)
            elif missing and self.rank == 0:
                waits += 1
                self._wait(min(MAX_WAIT_S, MIN_WAIT_S * 1.2**waits) * random.uniform(0.8, 1.2))
            else:
                return

    def _wait(self, seconds: float) -> None:
        self.worker.beat(state="waiting")
        end = time.monotonic() + seconds
        while not self.stopping and time.monotonic() < end:
            time.sleep(min(0.2, seconds))

    def _lease(self, missing: list[int]) -> int | None:
        """Lease a shard that a dead worker left, or the first free one of `missing`; None if there is none."""
        claimed, names = self.worker.claimed_by_all(), self.run.shard_names
        free = [index for index in missing if names[index] not in claimed]
        others = [index for index in missing if names[index] in claimed]  # by live and by dead workers
        random.shuffle(others)
        for index in [*others[:LEASES_CHECKED], *free, *others[LEASES_CHECKED:]]:
            if self.stopping:
                return None
            if names[index] not in claimed and self.worker.claim(names[index]):
                return index
            if names[index] in claimed and self.worker.take_over(names[index]):
                self.worker.forget_dead_workers()
                return index
        return None

    def _open(self, index: int) -> OpenShard:
        """Open a leased shard with the samples that earlier workers have left of it."""
        run, shard = self.run, self.run.plan.shard(index)
        found = salvage(run.directory, shard, run.job.retry == "quarantined")
        self.open_shards[shard.name] = opened = OpenShard(run.directory, shard, self.worker.id, found)
        opened.environment = environment(self._device, self._batch_sizes(shard.tasks[0].prompt))
        return opened

    def _missing_batches(self, opened: OpenShard) -> Iterator[Batch]:
        """Yield the batches in which a sample is missing, or an empty one if the shard only needs to be published."""
        shard, kept = opened.shard, set(opened.kept) | set(range(len(opened.settled)))
        if len(kept) == len(shard.tasks):
            yield Batch(shard, len(shard.tasks), ())
        for batch in batches(shard, self._batch_sizes):
            if not kept.issuperset(range(batch.start, batch.start + len(batch.tasks))):
                yield batch

    def _order(self) -> list[int]:
        """Return the indices of the shards, the longest first; in order if all panoramas cost the same."""
        if len(set(self._shapes.evaluations.values())) == 1 and not has_regions(self.run.plan):
            return list(range(self.run.plan.shard_count))
        return claim_order(shard_costs(self.run.plan, self._evaluations))

    def _evaluations(self, prompt: Prompt) -> int:
        return prompt_evaluations(self._shapes.evaluations, prompt)

    @cached_property
    def _shapes(self) -> Shapes:
        return Shapes(self.run)

    @cached_property
    def _batch_sizes(self) -> BatchSizes:
        return BatchSizes(self.run.job.sampling, self._shapes.geometry, self.run.device or "cpu")


class PlannedBatches:
    """Iterate over the batches of a job without a dataset on disk: every `count`-th one, from the `rank`-th on."""

    def __init__(self, run: ResolvedRun, rank: int, count: int):
        self.run, self.rank, self.count = run, rank, count

    def __len__(self) -> int:
        """Return an upper bound, see `WorkQueue`."""
        return -(-self.run.plan.samples // self.count)

    def __iter__(self) -> Iterator[Batch]:
        plan = self.run.plan
        sizes = BatchSizes(self.run.job.sampling, Shapes(self.run).geometry, self.run.device or "cpu")
        cut = (batch for index in range(plan.shard_count) for batch in batches(plan.shard(index), sizes))
        return islice(cut, self.rank, None, self.count)
