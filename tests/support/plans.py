"""Tables, tasks and datasets of plans that do not come from a prompt file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from madgen.config.loader import load_job
from madgen.config.schema import PromptsConfig
from madgen.dataset import manifest
from madgen.dataset.layout import DatasetDir
from madgen.dataset.plan import Plan
from madgen.prompts.builder import TableBuilder
from madgen.prompts.rows import Defaults
from madgen.prompts.table import PromptTable
from madgen.types import Prompt, Task


def table_of(prompts: Iterable[Prompt], samples_per_prompt: int = 1) -> PromptTable:
    """Build a table from prompts."""
    builder = TableBuilder(PromptsConfig(samples_per_prompt=samples_per_prompt), Defaults("", 0, 0), ["prompts"])
    for line, prompt in enumerate(prompts, 1):
        builder.add(prompt, 0, line)
    return builder.finish()


def tasks_of(plan: Plan) -> list[Task]:
    """Return all tasks of a plan, in order."""
    return [task for index in range(plan.shard_count) for task in plan.shard(index).tasks]


def new_dataset(plan: Plan, folder: Path) -> DatasetDir:
    """Create the directory of a dataset without shards."""
    directory = DatasetDir(folder / "out")
    manifest.create(directory, manifest.manifest(load_job([], ["name=job"]), plan, {"a": 1}))
    return directory
