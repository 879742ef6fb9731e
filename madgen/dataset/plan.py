"""Prompts to Shards: prompts x samples, cut in order. A pure function of the job."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from madgen.config.schema import Job
from madgen.prompts.cache import open_cached, plan_key
from madgen.prompts.readers._hub import is_hub
from madgen.prompts.reading import read_prompts
from madgen.prompts.table import PromptTable
from madgen.types import Batch, Prompt, Shard, Task, shard_name
from madgen.utils.errors import UserError
from madgen.utils.seeding import sample_seed


@dataclass(frozen=True)
class Plan:
    """Everything that a job will make; tasks and shards are computed when asked for."""

    name: str
    prompts: PromptTable
    samples_per_prompt: int
    samples_per_shard: int
    seed: int
    key: str = ""
    """Of all that the prompts depend on, see `plan_key`."""

    def __post_init__(self) -> None:
        if self.prompts.header.samples_per_prompt != self.samples_per_prompt:
            raise ValueError("the table's digest of keys is for another number of samples a prompt")

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
        return self._task(self.prompts[prompt_index], sample_index)

    def _task(self, prompt: Prompt, sample_index: int) -> Task:
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
        each = self.samples_per_prompt
        prompts = self.prompts[first // each : -(-last // each)]
        places = (divmod(position, each) for position in range(first, last))
        tasks = tuple(self._task(prompts[index - first // each], sample) for index, sample in places)
        return Shard(index, shard_name(self.name, index), tasks)

    @property
    def prompts_digest(self) -> str:
        """A hash over every id, text, size, own seed and region, in order."""
        return self.prompts.header.prompts_digest

    @property
    def keys_digest(self) -> str:
        """sha256 over every planned key, one a line, in order: what `verify` holds the shards against."""
        return self.prompts.header.keys_digest

    def save(self, cache: Path) -> Path:
        """Writes the prompts to a folder, where `build_plan` of the same job finds them. Raises OSError."""
        if not self.key:
            raise ValueError("only a plan of `build_plan` has a key to be saved under")
        cache.mkdir(exist_ok=True)
        path = cache / f"{self.key}.arrow"
        self.prompts.save(path)
        return path


def build_plan(job: Job, cache: Path | None = None) -> Plan:
    """Reads the prompts and lays out the samples; writes nothing.

    `cache`: a folder that `Plan.save` may have written to; what is there is not read again.
    """
    key = plan_key(job)
    table = open_cached(cache, key) if cache is not None else None
    if table is None:
        table = read_prompts(job.prompts, job.sampling.height, job.sampling.width)
        if is_hub(job.prompts.source):
            key = plan_key(job)  # reading it may have filled the library's cache
    samples, shards = job.prompts.samples_per_prompt, job.output.samples_per_shard
    if -(-len(table) * samples // shards) > 10**6:
        raise UserError(f"more than 10^6 shards of {shards} samples; raise output.samples_per_shard")
    return Plan(job.name, table, samples, shards, job.prompts.seed, key)


def batches(shard: Shard, batch_size: Callable[[Prompt], int]) -> Iterator[Batch]:
    """Cuts a shard at fixed positions, so that a resumed shard runs the same batches; one size a batch.

    `batch_size`: how many panoramas like a prompt's go together.
    """
    start = 0
    while start < len(shard.tasks):
        first = shard.tasks[start].prompt
        size = batch_size(first)
        alike = first.height, first.width, size
        stop = start + 1
        while stop < min(start + size, len(shard.tasks)):
            prompt = shard.tasks[stop].prompt
            if (prompt.height, prompt.width, batch_size(prompt)) != alike:
                break
            stop += 1
        yield Batch(shard, start, shard.tasks[start:stop])
        start = stop


def has_regions(plan: Plan) -> bool:
    """Whether any prompt has parts with prompts of their own."""
    totals = plan.prompts.header.totals
    return totals.texts != totals.sizes
