"""Prompts to Shards: prompts x samples, cut in order. A pure function of the job."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from madgen.config import Job
from madgen.errors import UserError
from madgen.plan.prompts import read_prompts
from madgen.plan.regions import region_identity
from madgen.seeding import sample_seed
from madgen.types import Batch, Prompt, Shard, Task


@dataclass(frozen=True)
class Plan:
    """Everything that a job will make; tasks and shards are computed when asked for."""

    name: str
    prompts: tuple[Prompt, ...]
    samples_per_prompt: int
    samples_per_shard: int
    seed: int

    @property
    def samples(self) -> int:
        """Panoramas in all."""
        return len(self.prompts) * self.samples_per_prompt

    @property
    def shard_count(self) -> int:
        """Shards in all; the last one may be shorter."""
        return -(-self.samples // self.samples_per_shard)

    def task(self, position: int) -> Task:
        """The task at a position in 0..samples-1: all samples of a prompt follow each other."""
        prompt_index, sample_index = divmod(position, self.samples_per_prompt)
        prompt = self.prompts[prompt_index]
        return Task(
            key=f"{prompt.id}-{sample_index:04d}",
            prompt=prompt,
            sample_index=sample_index,
            seed=self._seed(prompt, sample_index),
        )

    def _seed(self, prompt: Prompt, sample_index: int) -> int:
        """A line's own seed is the seed of its sample 0, so that a seed read from a dataset gives that picture."""
        if prompt.seed is not None and sample_index == 0:
            return prompt.seed
        return sample_seed(self.seed if prompt.seed is None else prompt.seed, prompt.id, sample_index)

    def shard(self, index: int) -> Shard:
        """The shard at `index` in 0..shard_count-1."""
        first = index * self.samples_per_shard
        last = min(first + self.samples_per_shard, self.samples)
        tasks = tuple(self.task(position) for position in range(first, last))
        return Shard(index, shard_name(self.name, index), tasks)

    @cached_property
    def prompts_digest(self) -> str:
        """A hash over every id, text, size, own seed and region, in order."""
        digest = hashlib.blake2b(digest_size=16)
        for prompt in self.prompts:
            fields = (prompt.id, prompt.text, prompt.negative, prompt.height, prompt.width, prompt.seed)
            digest.update(repr((*fields, *map(region_identity, prompt.regions))).encode())
        return digest.hexdigest()

    @cached_property
    def keys_digest(self) -> str:
        """sha256 over every planned key, one a line, in order: what `verify` holds the shards against."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            digest.update("".join(f"{prompt.id}-{index:04d}\n" for index in range(self.samples_per_prompt)).encode())
        return digest.hexdigest()


def shard_name(job_name: str, index: int) -> str:
    """File stem of a shard."""
    return f"{job_name}-{index:06d}"


def build_plan(job: Job) -> Plan:
    """Reads the prompts and lays out the samples; writes nothing."""
    prompts = read_prompts(
        job.prompts.source,
        negative_prompt=job.prompts.negative_prompt,
        height=job.sampling.height,
        width=job.sampling.width,
        limit=job.prompts.limit,
        on_duplicate=job.prompts.on_duplicate,
        regions=job.prompts.regions,
        across=job.prompts.across,
    )
    samples, shards = job.prompts.samples_per_prompt, job.output.samples_per_shard
    if -(-len(prompts) * samples // shards) > 10**6:
        raise UserError(f"more than 10^6 shards of {shards} samples; raise output.samples_per_shard")
    return Plan(job.name, tuple(prompts), samples, shards, job.prompts.seed)


def batches(shard: Shard, batch_size: int) -> Iterator[Batch]:
    """Cuts a shard at fixed positions, so that a resumed shard runs the same batches; one size a batch."""
    start = 0
    while start < len(shard.tasks):
        first = shard.tasks[start].prompt
        stop = start
        while stop < min(start + batch_size, len(shard.tasks)):
            prompt = shard.tasks[stop].prompt
            if (prompt.height, prompt.width) != (first.height, first.width):
                break
            stop += 1
        yield Batch(shard, start, shard.tasks[start:stop])
        start = stop
