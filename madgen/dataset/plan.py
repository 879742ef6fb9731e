"""Split prompts x samples into shards, in order.

The plan is a pure function of the job, and of the generations of its dataset if that has grown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path

import numpy as np

from madgen.config.schema import BlendConfig, Job
from madgen.dataset.format import Generation
from madgen.prompts.cache import open_cached, plan_key
from madgen.prompts.digests import KeysDigest
from madgen.prompts.picture_columns import PictureColumns
from madgen.prompts.readers._hub import is_hub
from madgen.prompts.reading import read_prompts
from madgen.prompts.table import PromptTable, Rows
from madgen.types import Batch, Prompt, Shard, Task, sample_key, shard_name
from madgen.utils.errors import UserError
from madgen.utils.seeding import sample_seed


@dataclass(frozen=True)
class Part:
    """Consecutive samples of some prompts of a plan."""

    rows: Rows
    """Rows of the prompts."""
    first: int
    """Number of the first sample of each prompt."""
    each: int
    """Samples of each prompt."""

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.rows) * self.each

    def place(self, row: int) -> int | None:
        """Return the index of a row of the plan in `rows`; None if it is not there."""
        if isinstance(self.rows, range):
            return row - self.rows.start if row in self.rows else None
        place = int(np.searchsorted(self.rows, row))
        return place if place < len(self.rows) and self.rows[place] == row else None


@dataclass(frozen=True)
class Stage:
    """The samples of one generation of a dataset; its shards are cut from its parts, in order."""

    parts: tuple[Part, ...]
    generation: Generation | None = None
    """Its record in `dataset.json`; None if the dataset has not grown."""

    def __len__(self) -> int:
        """Return the number of samples."""
        return sum(map(len, self.parts))


@dataclass(frozen=True)
class Plan:
    """All samples of a job; tasks and shards are computed on demand."""

    name: str
    prompts: PromptTable
    samples_per_prompt: int
    samples_per_shard: int
    seed: int
    key: str = ""
    """Hash of everything that the prompts depend on, see `plan_key`."""
    blend: BlendConfig = field(default_factory=BlendConfig)
    """Blending of the samples' initial noise."""
    grown: tuple[Stage, ...] = ()
    """The generations of a dataset that has grown or grows, oldest first, see `madgen.dataset.growth`."""

    def __post_init__(self) -> None:
        if self.prompts.header.samples_per_prompt != self.samples_per_prompt:
            raise ValueError("the table's digest of keys is for another number of samples a prompt")

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Return the generations, one if the dataset has not grown. Each begins with a shard of its own."""
        return self.grown or (Stage((Part(range(len(self.prompts)), 0, self.samples_per_prompt),)),)

    @property
    def extends(self) -> str | None:
        """Return the fingerprint of the dataset that the last generation extends; None if the dataset has not grown."""
        before = self.grown[-2].generation if self.grown else None
        return None if before is None else before.fingerprint

    @property
    def is_extension(self) -> bool:
        """Return whether the last generation is new, so that the dataset has none of its samples."""
        last = self.stages[-1].generation
        return last is not None and not last.fingerprint

    @property
    def samples(self) -> int:
        """Return the total number of panoramas."""
        return len(self.prompts) * self.samples_per_prompt

    @property
    def shard_count(self) -> int:
        """Return the total number of shards; the last one of a generation may be shorter."""
        return sum(-(-len(stage) // self.samples_per_shard) for stage in self.stages)

    def _tasks(self, stage: Stage, first: int, last: int) -> list[Task]:
        """Return the tasks at positions first..last-1 of a generation, which may end before `last`."""
        tasks: list[Task] = []
        for part in stage.parts:
            begin, end = max(first, 0), min(last, len(part))
            if begin < end:
                start = begin // part.each
                prompts = self._prompts(part.rows[start : -(-end // part.each)])
                places = (divmod(position, part.each) for position in range(begin, end))
                tasks += [self._task(prompts[place - start], part.first + number) for place, number in places]
            first, last = first - len(part), last - len(part)
        return tasks

    def _prompts(self, rows: Rows) -> list[Prompt]:
        if isinstance(rows, range):
            return self.prompts[rows.start : rows.stop]
        return [self.prompts[int(row)] for row in rows]

    def _task(self, prompt: Prompt, sample_index: int) -> Task:
        key = sample_key(self.prompts.header.key_prefix, prompt.id, sample_index)
        blend = self.blend.of_sample(sample_index, self._seed(prompt, 0)) if self.blend.is_on else None
        return Task(key, prompt, sample_index, self._seed(prompt, sample_index), blend)

    def _seed(self, prompt: Prompt, sample_index: int) -> int:
        """Return the seed of a sample.

        Sample 0 uses a seed of the prompt file unchanged, so that the seed of a recorded sample reproduces it.
        """
        if prompt.seed is not None and sample_index == 0:
            return prompt.seed
        return sample_seed(self.seed if prompt.seed is None else prompt.seed, prompt.id, sample_index)

    def shard(self, index: int) -> Shard:
        """Return the shard at `index` in 0..shard_count-1."""
        before = 0
        for stage in self.stages:
            shards = -(-len(stage) // self.samples_per_shard)
            if index < before + shards:
                first = (index - before) * self.samples_per_shard
                tasks = self._tasks(stage, first, first + self.samples_per_shard)
                return Shard(index, shard_name(self.name, index), tuple(tasks))
            before += shards
        raise IndexError(f"the plan has {before} shards")

    @property
    def prompts_digest(self) -> str:
        """Return a hash of the id, text, size, seed and regions of every prompt that the last generation adds."""
        generation = self.stages[-1].generation
        return (generation and generation.prompts_digest) or self.prompts.header.prompts_digest

    @cached_property
    def keys_digest(self) -> str:
        """Return the sha256 of every planned key, one per line, in order; `verify` compares the shards with it."""
        if not self.grown:
            return self.prompts.header.keys_digest
        digest = KeysDigest(0, self.prompts.header.key_prefix)
        for part in (part for stage in self.grown for part in stage.parts):
            digest.set_samples(range(part.first, part.first + part.each))
            for ids in self.prompts.subset_ids(part.rows):
                digest.update(ids)
        return digest.hexdigest()

    def save(self, cache: Path) -> Path:
        """Write the prompts to a cache folder for `build_plan` of the same job. Raises OSError."""
        if not self.key:
            raise ValueError("only a plan of `build_plan` has a key to be saved under")
        cache.mkdir(exist_ok=True)
        path = cache / f"{self.key}.arrow"
        self.prompts.save(path)
        return path


def build_plan(job: Job, cache: Path | None = None) -> Plan:
    """Read the prompts and plan the samples, without writing anything.

    `cache` is a folder that `Plan.save` may have written to. Prompts cached there are not read again.
    Raises UserError if there are too many shards, or not one share of blended noise for each sample.
    """
    job.method.noise.blend.check_count(job.prompts.samples_per_prompt, "prompts.samples_per_prompt")
    key = plan_key(job)
    table = open_cached(cache, key) if cache is not None else None
    if table is None:
        size, prefix = (job.sampling.height, job.sampling.width), job.output.key_prefix
        table = read_prompts(job.prompts, *size, key_prefix=prefix, pictures=PictureColumns.of(job))
        if is_hub(job.prompts.source):
            key = plan_key(job)  # reading it may have filled the hub library's cache
    samples, shards = job.prompts.samples_per_prompt, job.output.samples_per_shard
    if -(-len(table) * samples // shards) > 10**6:
        raise UserError(f"more than 10^6 shards of {shards} samples; raise output.samples_per_shard")
    return Plan(job.name, table, samples, shards, job.prompts.seed, key, job.method.noise.blend)


def batches(shard: Shard, batch_size: Callable[[Prompt], int]) -> Iterator[Batch]:
    """Yield batches of equal panorama size, split at fixed positions so that a resumed shard runs the same batches.

    `batch_size` returns the batch size for the panoramas of a prompt.
    """

    def kind(task: Task) -> tuple[int, int, int]:
        return task.prompt.height, task.prompt.width, batch_size(task.prompt)

    start = 0
    for (*_, size), run in groupby(shard.tasks, kind):
        while tasks := tuple(islice(run, size)):
            yield Batch(shard, start, tasks)
            start += len(tasks)


def has_regions(plan: Plan) -> bool:
    """Return whether any prompt has regions."""
    return any(totals.texts != totals.prompts for totals in plan.prompts.header.totals.sizes.values())
