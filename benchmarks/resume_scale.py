"""Measure how fast a finished dataset is recognized as complete: `python benchmarks/resume_scale.py [--shards 10000]`.

Writes the sidecars and sparse tars of a dataset, then times `madgen generate` and `madgen status` on it in separate
processes. With `--grow`, a tenth more prompts are appended, and `madgen plan`, `madgen generate` up to its first batch
and `madgen status` are timed with `output.resume=extend`. Prints a table with CPU time and peak resident memory.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from measured_commands import SCRIPT, measure, new_dataset

from madgen.dataset.checks.tar import tar_size
from madgen.dataset.format import SampleEntry, Sidecar
from madgen.dataset.index import write_index
from madgen.types import Shard

PER_SHARD = 100
STATUS = ["status", "out", "--json"]
UNTIL_SAMPLING = """
from madgen.generation.shard_pipeline import ShardPipeline
def stop(pipeline, queue):
    queue.worker.close()
    raise SystemExit
ShardPipeline.start = stop
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--grow", action="store_true", help="also measure growing by a tenth")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_dataset(root, options.shards)
        print("| command | samples | shards | seconds | CPU, s | peak MB |\n|---|---|---|---|---|---|")
        for command in (["generate", "job.yaml"], STATUS):
            report(root, command, options.shards)
        if options.grow:
            grow(root, options.shards)


def report(root: Path, command: list[str], shards: int, script: str = SCRIPT) -> None:
    """Print the row of a command."""
    cost = measure(command, root, script)
    name = " ".join(["madgen", *command])
    print(
        f"| {name} | {shards * PER_SHARD:,} | {shards:,} | {cost.seconds:.1f} | {cost.cpu_seconds:.1f} "
        f"| {cost.peak_mb:.0f} |",
        flush=True,
    )


def grow(root: Path, shards: int) -> None:
    """Append a tenth of the prompts and print the rows of commands that extend the dataset."""
    more = shards // 10
    with (root / "prompts.txt").open("a", encoding="utf-8") as stream:
        stream.writelines(f"{text}\n" for text in prompts(shards * PER_SHARD, (shards + more) * PER_SHARD))
    words = ["job.yaml", "output.resume=extend"]
    report(root, ["plan", *words], shards + more)
    report(root, ["generate", *words], shards + more, UNTIL_SAMPLING + SCRIPT)
    report(root, STATUS, shards + more)


def prompts(start: int, stop: int) -> Iterator[str]:
    """Yield distinct prompts, the same ones in every run."""
    return (f"a mountain lake at noon seen from the hills, number {number}" for number in range(start, stop))


def write_dataset(root: Path, shards: int) -> None:
    """Write a finished dataset whose tars are holes."""
    texts = prompts(0, shards * PER_SHARD)
    run = new_dataset(root, texts, {"height": 128, "width": 768}, {"samples_per_shard": PER_SHARD})
    for index in range(shards):
        shard = run.plan.shard(index)
        record, tar = sidecar(shard), run.directory.tar(shard.name)
        tar.touch()
        os.truncate(tar, tar_size(record.samples[-1].offset + record.samples[-1].size))
        run.directory.sidecar(shard.name).write_bytes(record.to_json())
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
