"""Compare one process with two on the demo job: `python benchmarks/demo_job.py processes [--rounds 2]`.

Runs the job with one thread per process, alternating between one and two processes. Prints the wall time of the
command, the time of generating (from `dataset.json`, written once the backbone is loaded, to the last sidecar) and the
CPU time; then the ratios of each round.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from measured_commands import ROOT, environment


@dataclass(frozen=True)
class Run:
    """One run of the command, in seconds."""

    command: float
    generating: float
    cpu: float


def run(devices: int, prompts: int) -> Run:
    """Generate the demo's panoramas."""
    with tempfile.TemporaryDirectory() as folder:
        job = ["jobs/demo.yaml", f"output.dir={folder}/out", f"prompts.limit={prompts}", f"trainer.devices={devices}"]
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        command = [sys.executable, "-m", "madgen", "generate", *job]
        done = subprocess.run(
            command, cwd=ROOT, env=environment(WANDB_DIR=folder), capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise SystemExit(done.stderr)
        seconds, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
        end = max(path.stat().st_mtime for path in Path(folder, "out/shards").glob("*.json"))
        generating = end - Path(folder, "out/dataset.json").stat().st_mtime
    return Run(seconds, generating, sum(after[:2]) - sum(before[:2]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("compare", choices=["processes"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=24, help="panoramas per run, at most 24")
    options = parser.parse_args()
    print("| round | processes | command, s | generating, s | CPU, s |\n|---|---|---|---|---|")
    rounds = []
    for number in range(1, options.rounds + 1):
        rounds.append([run(devices, options.prompts) for devices in (1, 2)])
        for devices, took in enumerate(rounds[-1], 1):
            print(f"| {number} | {devices} | {took.command:.1f} | {took.generating:.1f} | {took.cpu:.1f} |", flush=True)
    for name in ("command", "generating", "cpu"):
        ratios = [getattr(one, name) / getattr(two, name) for one, two in rounds]
        listed = ", ".join(f"{ratio:.3f}" for ratio in ratios)
        print(f"{name}, one process over two: {listed}; median {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
