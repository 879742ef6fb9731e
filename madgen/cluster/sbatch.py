"""Render the sbatch script of a job from the templates in `slurm/`, and submit it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from madgen.config.schema import Job
from madgen.utils.console import plural
from madgen.utils.errors import UserError
from madgen.utils.resources import resource

TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}")
ARRAY = re.compile(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%\d+)?")


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Resources to request from SLURM."""

    nodes: int = 1
    tasks_per_node: int | None = None
    """Processes per node; None: one per GPU, or one."""
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    time: str | None = None
    """In SLURM's notation: `24:00:00`, `2-12`."""
    array: str | None = None
    """Independent tasks: `0-63`, `0-63%8`."""
    options: Sequence[str] = field(default_factory=tuple)
    """Other options of sbatch, such as `--partition=gpu`."""

    def __post_init__(self) -> None:
        for name in ("nodes", "tasks_per_node", "gpus_per_node", "cpus_per_task"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} must be >= 1, got {value}")
        if self.time is not None and not TIME.fullmatch(self.time):
            raise UserError(f"--time must be like 24:00:00 or 2-12:00:00 (days-hours), got {self.time!r}")
        if self.array is not None and not ARRAY.fullmatch(self.array):
            raise UserError(f"--array must be like 0-63 or 0-63%8 (at most 8 at once), got {self.array!r}")
        if self.array is not None and self.nodes != 1:
            raise UserError(f"an array task runs on one node; remove --nodes={self.nodes} or --array")
        for option in self.options:
            if not re.fullmatch(r"-{1,2}[A-Za-z][^\n]*", option):
                raise UserError(f"--sbatch takes an option of sbatch, such as --sbatch=--exclusive, got {option!r}")

    @property
    def tasks(self) -> int:
        """Return the number of processes per node."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def workers(self) -> int:
        """Return the total number of processes, over all array tasks."""
        ranges = re.findall(r"(\d+)(?:-(\d+)(?::(\d+))?)?", (self.array or "0").partition("%")[0])
        tasks = sum(len(range(int(first), int(last or first) + 1, int(step or 1))) for first, last, step in ranges)
        return tasks * self.nodes * self.tasks

    @property
    def at_once(self) -> int:
        """Return how many of the `workers` may run at the same time."""
        limit = (self.array or "").partition("%")[2]
        return min(self.workers, int(limit) * self.tasks) if limit else self.workers

    def lines(self, name: str) -> list[str]:
        """Return the `#SBATCH` lines that replace those of the template."""
        values = {
            "--job-name": name,
            "--nodes": self.nodes,
            "--ntasks-per-node": self.tasks,
            "--gpus-per-node": self.gpus_per_node,
            "--cpus-per-task": self.cpus_per_task,
            "--time": self.time,
            "--array": self.array,
        }
        known = [f"{option}={value}" for option, value in values.items() if value is not None]
        return [f"#SBATCH {option}" for option in (*known, *self.options)]


def check(job: Job, resources: Resources) -> None:
    """Raise UserError if the job's trainer does not match the requested resources."""
    trainer = job.trainer
    for name, count, unit in (
        ("devices", resources.tasks, "processes per node"),
        ("num_nodes", resources.nodes, "nodes"),
    ):
        value = getattr(trainer, name)
        if value not in ("auto", count):
            raise UserError(f"trainer.{name}={value}, but {count} {unit} are requested; set trainer.{name}=auto")
    has_gpus = resources.gpus_per_node is not None or any("--g" in option for option in resources.options)
    if trainer.accelerator in ("gpu", "cuda") and not has_gpus:
        raise UserError(f"trainer.accelerator={trainer.accelerator}, but no GPU is requested; add --gpus-per-node 8")
    if trainer.accelerator == "cpu" and resources.gpus_per_node is not None:
        raise UserError("trainer.accelerator=cpu would leave the GPUs idle; set trainer.accelerator=gpu")
    if resources.gpus_per_node is not None and resources.tasks != resources.gpus_per_node:
        raise UserError(
            f"one process drives one GPU: --tasks-per-node {resources.tasks} does not match "
            f"--gpus-per-node {resources.gpus_per_node}; remove --tasks-per-node"
        )


def render(job: Job, arguments: Sequence[str], resources: Resources, env: Path | None = None) -> str:
    """Return an sbatch script that runs `madgen generate` with these arguments."""
    check(job, resources)
    script = template("array" if resources.array is not None else "generate").splitlines()
    lines = resources.lines(job.name)
    replaced = {_option(line) for line in lines}
    kept = [line for line in script if not line.startswith("#SBATCH") or _option(line) not in replaced]
    begin = next(i for i, line in enumerate(kept) if line.startswith("set -"))
    header = [line for line in kept[:begin] if line.startswith(("#!", "#SBATCH"))]
    programs = Path(sys.executable).absolute().parent  # so that nodes run the same madgen
    settings = [f"set -- {shlex.join(arguments)}", f"export PATH={shlex.quote(str(programs))}:$PATH"]
    if env is not None:
        if not env.is_file():
            raise UserError(f"--env={env} is not a file; start from slurm/env.example.sh")
        settings.append(f"export MADGEN_ENV={shlex.quote(str(env.absolute()))}")
    return "\n".join([*header, *lines, kept[begin], *settings, *kept[begin + 1 :], ""])


def _option(line: str) -> str:
    return line.removeprefix("#SBATCH").strip().partition("=")[0].split()[0]


def template(name: str) -> str:
    """Return the text of `slurm/<name>.sbatch`."""
    return (resource("slurm") / f"{name}.sbatch").read_text(encoding="utf-8")


def idle_workers(shards: int, workers: int) -> str | None:
    """Return a note if some workers would be idle, else None."""
    if shards >= workers:
        return None
    counts = f"{plural(shards, 'shard')} for {plural(workers, 'worker')}"
    return f"note: {counts}: some stay idle; lower output.samples_per_shard"


def require_sbatch() -> None:
    """Raise UserError if SLURM is not installed."""
    if shutil.which("sbatch") is None:
        raise UserError("sbatch is not installed here: run this on the cluster's login node, or add --dry-run")


def submit(script: str, chain: int = 1) -> list[str]:
    """Submit a script `chain` times, each job starting after the previous one ends; return the job ids."""
    ids: list[str] = []
    for _ in range(chain):
        after = [f"--dependency=afterany:{ids[-1]}"] if ids else []
        command = ["sbatch", "--parsable", *after]
        done = subprocess.run(command, input=os.fsencode(script), capture_output=True)
        if done.returncode != 0:
            earlier = f"; already submitted: {', '.join(ids)}" if ids else ""
            raise UserError(f"sbatch failed: {os.fsdecode(done.stderr or done.stdout).strip()}{earlier}")
        ids.append(os.fsdecode(done.stdout).strip().partition(";")[0])
    return ids


def next_commands(job: Job, ids: Sequence[str], array: bool) -> str:
    """Return the commands that watch and stop submitted jobs."""
    last = f" … {ids[-1]}" if len(ids) > 1 else ""
    log = f"{job.name}-{ids[0]}{'_0' if array else ''}.log"
    return "\n".join(
        [
            f"submitted {'jobs' if last else 'job'} {ids[0]}{last}",
            f"  squeue -j {','.join(ids)}      # is it running?",
            f"  tail -f {log}      # its log",
            f"  madgen status {job.output_dir}      # progress",
            f"  scancel {' '.join(ids)}      # stop it; submit again to resume",
        ]
    )
