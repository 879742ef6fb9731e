"""`submit`: the sbatch script of a job, from those in `slurm/`, handed to SLURM. Knows no Lightning."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from madgen.config.schema import Job
from madgen.utils.errors import UserError

TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}")
ARRAY = re.compile(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%\d+)?")


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What to ask SLURM for."""

    nodes: int = 1
    tasks_per_node: int | None = None
    """Processes on a node; None: one a GPU, or one."""
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    time: str | None = None
    """As SLURM writes it: `24:00:00`, `2-12`."""
    array: str | None = None
    """Independent tasks: `0-63`, `0-63%8`."""
    options: Sequence[str] = field(default_factory=tuple)
    """Further options of sbatch, such as `--partition=gpu`."""

    def __post_init__(self) -> None:
        for name, least in (("nodes", 1), ("tasks_per_node", 1), ("gpus_per_node", 1), ("cpus_per_task", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} must be >= {least}, got {value}")
        if self.time is not None and not TIME.fullmatch(self.time):
            raise UserError(f"--time must be like 24:00:00 or 2-12:00:00 (days-hours), got {self.time!r}")
        if self.array is not None and not ARRAY.fullmatch(self.array):
            raise UserError(f"--array must be like 0-63 or 0-63%8 (at most 8 at once), got {self.array!r}")
        if self.array is not None and self.nodes != 1:
            raise UserError(f"an array task is one node's work; leave --nodes={self.nodes} out, or --array")
        for option in self.options:
            if not re.fullmatch(r"-{1,2}[A-Za-z][^\n]*", option):
                raise UserError(f"--sbatch takes an option of sbatch, such as --sbatch=--exclusive, got {option!r}")

    @property
    def tasks(self) -> int:
        """Processes on a node."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def workers(self) -> int:
        """Processes in all, if everything runs at once."""
        ranges = re.findall(r"(\d+)(?:-(\d+)(?::(\d+))?)?", (self.array or "0").partition("%")[0])
        tasks = sum(len(range(int(first), int(last or first) + 1, int(step or 1))) for first, last, step in ranges)
        return tasks * self.nodes * self.tasks

    @property
    def at_once(self) -> int:
        """As `workers`, of which an array may run only some at a time."""
        most = (self.array or "").partition("%")[2]
        return min(self.workers, int(most) * self.tasks) if most else self.workers

    def lines(self, name: str) -> list[str]:
        """The `#SBATCH` lines that take the place of the script's own."""
        given = {
            "--job-name": name,
            "--nodes": self.nodes,
            "--ntasks-per-node": self.tasks,
            "--gpus-per-node": self.gpus_per_node,
            "--cpus-per-task": self.cpus_per_task,
            "--time": self.time,
            "--array": self.array,
        }
        own = [f"{option}={value}" for option, value in given.items() if value is not None]
        return [f"#SBATCH {option}" for option in (*own, *self.options)]


def check(job: Job, resources: Resources) -> None:
    """UserError where the job's trainer wants other processes than SLURM would be asked for."""
    trainer, wanted = job.trainer, {"devices": resources.tasks, "num_nodes": resources.nodes}
    asked = {"devices": "processes on a node", "num_nodes": "nodes"}
    for name, count in wanted.items():
        value = getattr(trainer, name)
        if value not in ("auto", count):
            raise UserError(f"trainer.{name}={value}, but {count} {asked[name]} are asked for; set trainer.{name}=auto")
    if trainer.accelerator in ("gpu", "cuda") and not _has_gpus(resources):
        raise UserError(f"trainer.accelerator={trainer.accelerator}, but no GPU is asked for; add --gpus-per-node 8")
    if trainer.accelerator == "cpu" and resources.gpus_per_node is not None:
        raise UserError("trainer.accelerator=cpu would leave the GPUs idle; set trainer.accelerator=gpu")
    if resources.gpus_per_node is not None and resources.tasks != resources.gpus_per_node:
        raise UserError(
            f"one process drives one GPU: --tasks-per-node {resources.tasks} does not go with "
            f"--gpus-per-node {resources.gpus_per_node}; leave --tasks-per-node out"
        )


def _has_gpus(resources: Resources) -> bool:
    return resources.gpus_per_node is not None or any("--g" in option for option in resources.options)


def render(job: Job, arguments: Sequence[str], resources: Resources, env: Path | None = None) -> str:
    """The script that runs `madgen generate` with these arguments; plain `sbatch` takes it too."""
    check(job, resources)
    script = template("array" if resources.array is not None else "generate").splitlines()
    lines = resources.lines(job.name)
    replaced = {_option(line) for line in lines}
    kept = [line for line in script if not line.startswith("#SBATCH") or _option(line) not in replaced]
    begin = next(i for i, line in enumerate(kept) if line.startswith("set -"))
    header = [line for line in kept[:begin] if line.startswith(("#!", "#SBATCH"))]
    settings = [f"set -- {shlex.join(arguments)}", f"export PATH={shlex.quote(_programs())}:$PATH"]
    if env is not None:
        if not env.is_file():
            raise UserError(f"--env={env} is not a file; slurm/env.example.sh is one to begin with")
        settings.append(f"export MADGEN_ENV={shlex.quote(str(env.absolute()))}")
    return "\n".join([*header, *lines, kept[begin], *settings, *kept[begin + 1 :], ""])


def _option(line: str) -> str:
    return line.removeprefix("#SBATCH").strip().partition("=")[0].split()[0]


def _programs() -> str:
    """The folder of the `madgen` that runs now: the nodes shall run the same."""
    return str(Path(sys.executable).absolute().parent)


def template(name: str) -> str:
    """`slurm/<name>.sbatch`, of the checkout or as it was installed."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "_slurm", package.parent / "slurm"):
        if (folder / f"{name}.sbatch").is_file():
            return (folder / f"{name}.sbatch").read_text(encoding="utf-8")
    raise FileNotFoundError(f"{name}.sbatch is missing from this installation of madgen")


def idle_workers(shards: int, workers: int) -> str | None:
    """A note where some would find nothing to do; None if none would."""
    if shards >= workers:
        return None
    return f"note: {shards} shards for {workers} workers: some find nothing to do; lower output.samples_per_shard"


def require_sbatch() -> None:
    """UserError where there is no SLURM."""
    if shutil.which("sbatch") is None:
        raise UserError("there is no sbatch on this machine: run it on the cluster's login node, or add --dry-run")


def submit(script: str, chain: int = 1) -> list[str]:
    """Job ids, as SLURM gave them; with a `chain` each job waits for the end of the one before."""
    ids: list[str] = []
    for _ in range(chain):
        after = [f"--dependency=afterany:{ids[-1]}"] if ids else []
        done = subprocess.run(["sbatch", "--parsable", *after], input=script, capture_output=True, text=True)
        if done.returncode != 0:
            before = f"; submitted before that: {', '.join(ids)}" if ids else ""
            raise UserError(f"sbatch refuses it: {done.stderr.strip() or done.stdout.strip()}{before}")
        ids.append(done.stdout.strip().partition(";")[0])
    return ids


def what_next(job: Job, ids: Sequence[str], array: bool) -> str:
    """Where to look now, in a few lines."""
    last = f" … {ids[-1]}" if len(ids) > 1 else ""
    log = f"{job.name}-{ids[0]}{'_0' if array else ''}.log"
    return "\n".join(
        [
            f"submitted {'jobs' if last else 'job'} {ids[0]}{last}",
            f"  squeue -j {','.join(ids)}      is it running?",
            f"  tail -f {log}      what does it say?",
            f"  madgen status {job.output_dir}      how far is it?",
            f"  scancel {' '.join(ids)}      stop it; the same command continues",
        ]
    )
