"""Two forms of one command on the demo job, in turn: `python benchmarks/demo_job.py processes|monitoring [--rounds 2]`.

`processes`: one process with one thread against two of them, on two cores. `monitoring`: without any observer against
the bar and an offline W&B run with a preview of every fifth panorama. Prints wall-clock seconds of the whole command
and of the time in which panoramas were made (from `dataset.json`, which is written when the backbone is loaded, to the
last sidecar), the processor time of the first process, and their ratios round by round.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMAND = ("-m", "madgen")
UNWATCHED = (
    "-c", "import madgen.generation.run as run; "
    "run._observers = lambda job: (); from madgen.cli.app import main; main()"
)  # fmt: skip
COMPARED = {
    "processes": ((COMMAND, "trainer.devices=1"), (COMMAND, "trainer.devices=2")),
    "monitoring": (
        (UNWATCHED, "trainer.devices=1", "monitor.wandb.mode=disabled"),
        (COMMAND, "trainer.devices=1", "monitor.preview_every=5"),
    ),
}


@dataclass(frozen=True)
class Run:
    """One run of the command, in seconds."""

    command: float
    making: float
    processor: float


def run(program: tuple[str, ...], options: tuple[str, ...], prompts: int) -> Run:
    """Makes the demo's panoramas with one thread a process."""
    with tempfile.TemporaryDirectory() as folder:
        job = ["jobs/demo.yaml", f"output.dir={folder}/out", f"prompts.limit={prompts}", *options]
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_DIR": folder, "PYTHONPATH": str(ROOT)}
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        with open(f"{folder}/log", "w+") as log:
            done = subprocess.run(
                [sys.executable, *program, "generate", *job], cwd=ROOT, env=environ, stderr=log, check=False
            )
            log.seek(0)
            if done.returncode != 0:
                raise SystemExit(log.read())
        command, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
        shards = list(Path(folder, "out/shards").glob("*.json"))
        begun = Path(folder, "out/dataset.json").stat().st_mtime
        making = max(path.stat().st_mtime for path in shards) - begun
    return Run(command, making, sum(after[:2]) - sum(before[:2]))


def main() -> None:
    """Runs both forms in turn and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("compare", choices=COMPARED)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=24, help="panoramas a run, of at most 24")
    given = parser.parse_args()
    forms = COMPARED[given.compare]
    print("| round | form | command, s | making, s | processor, s |\n|---|---|---|---|---|")
    pairs = []
    for number in range(given.rounds):
        pair = [run(program, tuple(options), given.prompts) for program, *options in forms]
        pairs.append(pair)
        for (program, *options), took in zip(forms, pair, strict=True):
            form = " ".join([*options, *["unwatched"] * (program == UNWATCHED)])
            print(
                f"| {number + 1} | {form} | {took.command:.1f} | {took.making:.1f} | {took.processor:.1f} |", flush=True
            )
    for name in ("command", "making", "processor"):
        ratios = [getattr(first, name) / getattr(second, name) for first, second in pairs]
        told = ", ".join(f"{ratio:.3f}" for ratio in ratios)
        print(f"{name}: first over second {told}; median {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
