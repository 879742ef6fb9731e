"""How long a finished dataset takes to be found finished: `python benchmarks/resume_scale.py [--shards 10000]`.

Makes sidecars (and empty tars) of a dataset as `generate` would have left them, then times `madgen generate` and
`madgen status` on it, each in a process of its own; prints a table with wall time and peak resident memory.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from madgen.config.loader import load_job
from madgen.dataset import manifest
from madgen.dataset.format import SampleEntry, Sidecar
from madgen.dataset.index import write_index
from madgen.dataset.layout import DatasetDir
from madgen.dataset.plan import build_plan
from madgen.types import Shard

PER_SHARD = 100


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shards", type=int, default=10_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        build(root, options.shards)
        print("| command | samples | shards | seconds | peak MB |\n|---|---|---|---|---|")
        for command in (["generate", "job.yaml"], ["status", "out", "--json"]):
            seconds, peak = measure(command, root)
            name = " ".join(["madgen", *command])
            print(f"| {name} | {options.shards * PER_SHARD:,} | {options.shards:,} | {seconds:.1f} | {peak:.0f} |")


def build(root: Path, shards: int) -> None:
    """A finished dataset without pictures."""
    texts = (f"a mountain lake at noon seen from the hills, number {i}\n" for i in range(shards * PER_SHARD))
    (root / "prompts.txt").write_text("".join(texts))
    (root / "job.yaml").write_text(
        "backbone: {pretrained: demo}\nsampling: {height: 128, width: 768}\nprompts: {source: prompts.txt}\n"
        f"output: {{dir: {root}/out, samples_per_shard: {PER_SHARD}}}\nmonitor: {{wandb: {{mode: disabled}}}}\n"
        "trainer: {accelerator: cpu, devices: 1}\n"
    )
    job = load_job(root / "job.yaml")
    plan, directory = build_plan(job), DatasetDir(job.output_dir)
    manifest.create(directory, manifest.build(job, plan, "float32"))
    for index in range(shards):
        shard = plan.shard(index)
        directory.tar(shard.name).touch()
        directory.sidecar(shard.name).write_bytes(sidecar(shard).to_json())
    write_index(directory)


def sidecar(shard: Shard) -> Sidecar:
    """Describe a shard as `OpenShard` does."""
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


def measure(command: list[str], folder: Path) -> tuple[float, float]:
    """Wall seconds, and peak resident memory in MB, of one command."""
    script = "import sys; from madgen.cli.app import main\ntry: main()\nfinally: " + (
        "print(*(line for line in open('/proc/self/status') if 'VmHWM' in line), file=sys.stderr)"
    )  # ru_maxrss would begin at this process's own
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", script, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - begin
    if done.returncode:
        sys.exit(f"{command}: exit {done.returncode}\n{done.stderr}")
    return seconds, int(done.stderr.split()[-2]) / 1024


if __name__ == "__main__":
    main()
