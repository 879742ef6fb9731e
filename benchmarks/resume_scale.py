"""Measure how fast a finished dataset is recognized as complete: `python benchmarks/resume_scale.py [--shards 10000]`.

Writes the sidecars and empty tars of a dataset, then times `madgen generate` and `madgen status` on it in separate
processes. Prints a table with wall time and peak resident memory.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from pathlib import Path

from common import measure, new_dataset

from madgen.dataset.format import SampleEntry, Sidecar
from madgen.dataset.index import write_index
from madgen.types import Shard

PER_SHARD = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shards", type=int, default=10_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_dataset(root, options.shards)
        print("| command | samples | shards | seconds | peak MB |\n|---|---|---|---|---|")
        for command in (["generate", "job.yaml"], ["status", "out", "--json"]):
            cost = measure(command, root)
            name, samples = " ".join(["madgen", *command]), options.shards * PER_SHARD
            print(f"| {name} | {samples:,} | {options.shards:,} | {cost.seconds:.1f} | {cost.peak_mb:.0f} |")


def write_dataset(root: Path, shards: int) -> None:
    """Write a finished dataset without images."""
    texts = (f"a mountain lake at noon seen from the hills, number {i}" for i in range(shards * PER_SHARD))
    run = new_dataset(root, texts, {"height": 128, "width": 768}, {"samples_per_shard": PER_SHARD})
    for index in range(shards):
        shard = run.plan.shard(index)
        run.directory.tar(shard.name).touch()
        run.directory.sidecar(shard.name).write_bytes(sidecar(shard).to_json())
    write_index(run.directory)


def sidecar(shard: Shard) -> Sidecar:
    """Return the sidecar of a shard as `OpenShard` writes it."""
    samples = tuple(
        SampleEntry(
            task.key, task.seed, task.prompt.text, 75_000 * number, 75_000,
            hashlib.sha256(task.key.encode()).hexdigest(), 128, 768,
        )
        for number, task in enumerate(shard.tasks)
    )  # fmt: skip
    seconds, end = {"sample": 90.0, "decode": 9.0, "write": 1.0, "wait": 0.0}, time.time()
    times = {"started": end - 100, "finished": end}
    return Sidecar(shard.name, shard.index, samples, (), seconds, made=len(samples), worker="node-1-abc", **times)


if __name__ == "__main__":
    main()
