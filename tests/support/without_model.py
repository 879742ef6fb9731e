"""Datasets that are written as `madgen generate` writes them, with noise in place of a model's pictures."""

import numpy as np

from madgen.config.loader import load_job
from madgen.dataset import manifest
from madgen.dataset.encoding import encode_sample
from madgen.dataset.growth import join
from madgen.dataset.identity import WeightIds, job_identity
from madgen.dataset.index import write_index, write_quarantine
from madgen.dataset.layout import DatasetDir
from madgen.dataset.plan import Plan
from madgen.dataset.sample_json import sample_metadata, sample_settings
from madgen.dataset.shards.leases import remove_work
from madgen.dataset.shards.writer import OpenShard
from madgen.prompts.builder import TableBuilder
from madgen.prompts.rows import Defaults
from madgen.types import Prompt, Record

HEIGHT, WIDTH = 16, 32


def prompts_of(texts, **fields):
    return [Prompt(text.replace(" ", "_"), text, "", HEIGHT, WIDTH, **fields) for text in texts]


def plan_of(job, prompts):
    builder = TableBuilder(job.prompts, Defaults("", HEIGHT, WIDTH), ["prompts"], key_prefix=job.output.key_prefix)
    for line, prompt in enumerate(prompts, 1):
        builder.add(prompt, 0, line)
    samples, shards = job.prompts.samples_per_prompt, job.output.samples_per_shard
    return Plan(job.name, builder.finish(), samples, shards, job.prompts.seed)


def write(root, prompts, *overrides, weights="w", shards=None, quarantined=()):
    """Generate a dataset, or extend it, on weights that determine the pictures; `shards`: indices, by default all."""
    job = load_job([], ["name=made", "output.samples_per_shard=3", "output.resume=extend", *overrides])
    directory = DatasetDir(root)
    plan = join(plan_of(job, prompts), directory, extend=True)
    content = manifest.manifest(job, plan, job_identity(job, plan, "float32", WeightIds(weights)))
    manifest.create(directory, content, "extend")
    manifest.extend(directory, content)
    for index in range(plan.shard_count):
        if not directory.is_done(plan.shard(index).name) and (shards is None or index in shards):
            _write_shard(directory, job, content, plan.shard(index), weights, quarantined)
    if shards is None:
        write_index(directory)
        write_quarantine(directory)
        remove_work(directory)
    return directory


def _write_shard(directory, job, content, shard, weights, quarantined):
    settings = sample_settings(job, content) | {"fingerprint": content.shard_fingerprint(shard.index)}
    opened = OpenShard(directory, shard, "worker")
    for position, task in enumerate(shard.tasks):
        if task.key in quarantined:
            opened.quarantine(position, "constant", "nothing to see")
            continue
        seed = [task.seed, *weights.encode(), *task.prompt.text.encode()]
        image = np.random.default_rng(seed).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        record = Record(task, image, sample_metadata(task, settings))
        opened.add(position, encode_sample(record, job.output.format, job.output.quality))
    opened.publish()
