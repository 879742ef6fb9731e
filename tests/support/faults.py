"""Measure what happens when workers are killed, stopped or fail: `python tests/support/faults.py [--kills 100]`.

Every scenario generates a small dataset on the demo backbone with real processes and real signals, and compares it with
the dataset of an undisturbed run: every key exactly once, tars of the same bytes, only samples in flight sampled again,
no stray files. Prints a table; exit status 1 if a scenario fails.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import faults_disk
from faults_worker import FINISHED, Sabotage, work
from forks import Fork

from madgen.dataset.card import PICTURE_FILES
from madgen.dataset.layout import DatasetDir
from madgen.dataset.verify import verify

PANORAMAS, SHARD, BATCH = 24, 5, 2
LOST_A_KILL = 2 * BATCH
"""Samples lost per kill: the batch being sampled and the batch being written."""
JOB = f"""
backbone: {{pretrained: demo}}
method: {{mad: {{steps: 1}}}}
sampling: {{height: 128, width: 192, num_inference_steps: 2, guidance_scale: 1.0, batch_size: {BATCH}}}
prompts: {{source: prompts.txt}}
output: {{samples_per_shard: {SHARD}}}
monitor: {{wandb: {{mode: disabled}}}}
trainer: {{accelerator: cpu, devices: 1}}
"""


@dataclass
class Outcome:
    """One row of the table."""

    scenario: str
    faults: int = 0
    planned: int = 0
    made: int = 0
    allowed: int = 0
    """Samples that may have been sampled again."""
    problems: list[str] = field(default_factory=list)

    def row(self) -> str:
        """Format the row as Markdown."""
        verdict = "; ".join(self.problems) or "exactly once, same bytes, nothing stray"
        again = f"{self.made - self.planned} of at most {self.allowed}"
        return f"| {self.scenario} | {self.faults} | {self.planned} | {again} | {verdict} |"


class Lab:
    """A folder with a job, the dataset of an undisturbed run, and datasets of disturbed ones."""

    def __init__(self, folder: Path, panoramas: int = PANORAMAS):
        self.folder, self.panoramas = folder, panoramas
        (folder / "job.yaml").write_text(JOB, encoding="utf-8")
        (folder / "prompts.txt").write_text("".join(f"hills at noon {i}\n" for i in range(panoramas)), encoding="utf-8")
        self.numbers = itertools.count()
        self.reference = DatasetDir(folder / "reference")
        assert self.finish(self.reference) == 0, (folder / "reference.log").read_text(encoding="utf-8")
        self.expected = tars(self.reference)

    def new(self) -> DatasetDir:
        """Return a new directory for one dataset."""
        return DatasetDir(self.folder / f"dataset-{next(self.numbers)}")

    def start(self, directory: DatasetDir, sabotage: Sabotage | None = None) -> Fork:
        """Start a worker in another process."""
        return Fork(work, self.folder, directory.root, sabotage, 60.0)

    def finish(self, directory: DatasetDir) -> int:
        """Run one worker until it ends; return its exit status."""
        return self.start(directory).wait()

    def made(self, directory: DatasetDir) -> int:
        """Count samples over all workers of a dataset, including lost ones."""
        return len(sampled(self.folder, directory).read_text(encoding="utf-8").splitlines())

    def judge(self, outcome: Outcome, directory: DatasetDir) -> None:
        """Compare a finished dataset with the reference and add the differences to the outcome."""
        verdict = verify(directory)
        outcome.planned += self.panoramas
        outcome.made += self.made(directory)
        outcome.problems += verdict.problems
        if not verdict.complete:
            outcome.problems.append(f"{verdict.present} of {verdict.planned} present")
        if tars(directory) != self.expected:
            outcome.problems.append("other bytes")
        stray = {str(path.relative_to(directory.root)) for path in directory.root.rglob("*")} - FINISHED
        stray = {name for name in stray if not name.startswith("shards/job-")} - {"samples", *PICTURE_FILES}
        if stray or (directory.root / "work").exists():
            outcome.problems.append(f"stray files {sorted(stray)}")
        if outcome.made - outcome.planned > outcome.allowed:
            outcome.problems.append("too much made again")


def sampled(folder: Path, directory: DatasetDir) -> Path:
    """Return the path of a dataset's log of sampled seeds."""
    return folder / f"{directory.root.name}.sampled"


def tars(directory: DatasetDir) -> dict[str, str]:
    """Return the sha256 of every tar."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.shards.glob("*.tar")}


def kills(lab: Lab, count: int, seed: int = 0) -> Outcome:
    """Run two workers; `count` times, kill one at a random instant and replace it."""
    chance, outcome = random.Random(seed), Outcome("2 workers, SIGKILL at random instants")
    while outcome.faults < count:
        directory = lab.new()
        workers = [lab.start(directory) for _ in range(2)]
        while outcome.faults < count and any(worker.poll() is None for worker in workers):
            wait_for_samples(lab, directory, workers)
            time.sleep(chance.uniform(0, 0.8))
            victim = chance.randrange(2)
            if workers[victim].poll() is None:
                workers[victim].kill()
                outcome.faults += 1
                outcome.allowed += LOST_A_KILL
                workers[victim] = lab.start(directory)
        for worker in workers:
            worker.wait()
        lab.finish(directory)  # both may have been killed at the very end
        lab.judge(outcome, directory)
    return outcome


def wait_for_samples(lab: Lab, directory: DatasetDir, workers: list) -> None:
    """Wait until another sample is logged, or no worker is left."""
    log = sampled(lab.folder, directory)
    before = log.stat().st_size if log.exists() else 0
    while any(worker.poll() is None for worker in workers):
        if log.exists() and log.stat().st_size > before:
            return
        time.sleep(0.005)


def crowd(lab: Lab) -> Outcome:
    """Run four workers on one directory: one is killed, one starts late."""
    outcome, directory = Outcome("4 workers, one killed, one late", faults=1, allowed=LOST_A_KILL), lab.new()
    workers = [lab.start(directory) for _ in range(3)]
    wait_for_samples(lab, directory, workers)
    workers[0].kill()
    workers.append(lab.start(directory))
    for worker in workers:
        worker.wait()
    outcome.problems += [f"exit {worker.poll()}" for worker in workers[1:] if worker.poll()]
    lab.judge(outcome, directory)
    return outcome


def stopped(lab: Lab, late: bool) -> Outcome:
    """Stop a worker (SIGSTOP) until its lease has expired and another has taken over, then continue it.

    With `late`, continue it only after the other has finished the dataset.
    """
    when = "when all is done" if late else "while another works"
    outcome, directory = Outcome(f"SIGSTOP past the lease, SIGCONT {when}", faults=1), lab.new()
    sleeper = lab.start(directory)
    wait_for_samples(lab, directory, [sleeper])
    os.kill(sleeper.pid, signal.SIGSTOP)
    for heartbeat in directory.root.glob("work/workers/*.json"):
        os.utime(heartbeat, (0, 0))
    other = lab.start(directory)
    wait_for_samples(lab, directory, [other])
    if late:
        other.wait()
    os.kill(sleeper.pid, signal.SIGCONT)
    for worker in (other, sleeper):
        worker.wait()
        outcome.problems += [f"exit {worker.poll()}"] if worker.poll() else []
    # It continues its shard, which the other has taken over, and loses what a kill would have lost.
    outcome.allowed = LOST_A_KILL + SHARD
    lab.judge(outcome, directory)
    return outcome


def sabotaged(lab: Lab, sabotage: Sabotage) -> Outcome:
    """Let one call fail: the run ends with the expected status, and the next one completes the dataset."""
    outcome, directory = (
        Outcome(sabotage.name, faults=1, allowed=LOST_A_KILL),
        lab.new(),
    )
    status = lab.start(directory, sabotage).wait()
    if status != sabotage.status:
        outcome.problems.append(f"exit {status}, expected {sabotage.status}")
    if lab.finish(directory) != 0:
        outcome.problems.append("did not finish")
    lab.judge(outcome, directory)
    return outcome


def mounted(lab: Lab, disk: str) -> Outcome:
    """Run a scenario of `faults_disk.py` in a mount namespace."""
    scenario, _, stops = faults_disk.SCENARIOS[disk]
    outcome, directory = Outcome(scenario, faults=stops, allowed=LOST_A_KILL * stops), lab.new()
    status = Fork(faults_disk.run, disk, lab.folder, directory.root).wait()
    if status:
        errors = directory.root.with_suffix(".err").read_text(encoding="utf-8")
        outcome.problems.append(f"exit {status}: {errors.strip()[-3000:]}")
    else:
        lab.judge(outcome, directory)
    return outcome


def scenarios(lab: Lab, count: int) -> list[Callable[[], Outcome]]:
    """Return all scenarios of the table."""
    faults = [lambda each=each: sabotaged(lab, each) for each in Sabotage.all()]
    disks = [lambda disk=disk: mounted(lab, disk) for disk in faults_disk.SCENARIOS]
    sleepers = [lambda late=late: stopped(lab, late) for late in (False, True)]
    return [lambda: kills(lab, count), lambda: crowd(lab), *sleepers, *faults, *disks]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder))
        print("| scenario | faults | panoramas | made again | outcome |\n|---|---|---|---|---|", flush=True)
        broken = False
        for scenario in scenarios(lab, options.kills):
            outcome = scenario()
            print(outcome.row(), flush=True)
            broken = broken or bool(outcome.problems)
    sys.exit(broken)


if __name__ == "__main__":
    main()
