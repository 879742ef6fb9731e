"""A plan of two shards, and workers that write the first one."""

import numpy as np
from plans import table_of

from madgen.dataset.encoding import encode_sample
from madgen.dataset.plan import Plan
from madgen.dataset.shards.recovery import salvage
from madgen.dataset.shards.writer import OpenShard
from madgen.types import Prompt, Record

PLAN = Plan("job", table_of(Prompt(f"p{i}", f"text {i}", "", 8, 16) for i in range(8)), 1, 4, 0)


SHARD = PLAN.shard(0)


def metadata(task):
    return {"key": task.key, "seed": task.seed, "prompt": task.prompt.text, "height": 8, "width": 16}


def sample(task, image_format="png"):
    image = np.random.default_rng(task.seed).integers(0, 255, (8, 16, 3), dtype=np.uint8)
    return encode_sample(Record(task, image, metadata(task)), image_format, 95)


def salvaged(directory, retry=False):
    return salvage(directory, SHARD, retry)


def resume(directory, **options):
    """Resume the first shard as a worker does; return the number of samples that it generated."""
    shard = OpenShard(directory, SHARD, "w", salvaged(directory, **options))
    for position, task in enumerate(SHARD.tasks):
        if position >= len(shard.settled):
            shard.add(position, sample(task))
    assert shard.publish()
    return shard.made


def begin(directory, count):
    shard = OpenShard(directory, SHARD, "w")
    for position in range(count):
        shard.add(position, sample(SHARD.tasks[position]))
    return shard


def is_clean(directory):
    return list(directory.open_shards.iterdir()) == []
