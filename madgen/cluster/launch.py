"""Ranks and world sizes of processes started by srun, by torchrun or by Lightning.

Processes synchronize at the start and exchange nothing afterwards, so gloo suffices on GPUs too: it needs no
communicator, and no watchdog ends a process because another one has died.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

from madgen.config.schema import TrainerConfig
from madgen.utils.errors import UserError
from madgen.utils.validation import environment_number

Kind = Literal["srun", "torchrun", "alone"]
START_TIMEOUT = timedelta(minutes=30)
"""Time limit for all processes to start and to load their weights."""
INTERACTIVE_STEP = "4294967290"
"""SLURM_STEP_ID of the shell that salloc starts."""
COUNT = re.compile(r"(\d{1,6})(?:\(x(\d{1,6})\))?")  # SLURM's "2(x3)": 2 on each of 3 nodes


@dataclass(frozen=True)
class Placement:
    """The launcher of this process and the number of processes."""

    kind: Kind
    devices: int | str
    """Processes per node; `auto`: as Lightning chooses."""
    nodes: int

    def environment(self) -> Any:
        """Return the Lightning ClusterEnvironment, which knows ranks and addresses."""
        from lightning.pytorch.plugins import environments

        if self.kind == "srun":
            return environments.SLURMEnvironment(auto_requeue=False)
        if self.kind == "torchrun":
            return environments.TorchElasticEnvironment()
        return environments.LightningEnvironment()

    @property
    def joins_a_group(self) -> bool:
        """Return whether other processes wait for this one at the start."""
        return self.kind != "alone" and (self.devices != 1 or self.nodes != 1)


def placement(config: TrainerConfig, variables: MutableMapping[str, str] = os.environ) -> Placement:
    """Detect the launcher; UserError, with the launcher's options, if the job requests another number of processes."""
    if "TORCHELASTIC_RUN_ID" in variables:
        per_node = environment_number(variables, "LOCAL_WORLD_SIZE")
        total = environment_number(variables, "WORLD_SIZE")
        if not 0 < per_node <= total:
            raise UserError(f"LOCAL_WORLD_SIZE={per_node} and WORLD_SIZE={total} contradict each other; use torchrun")
        _check_counts(config, per_node, total // per_node, "torchrun", "--nproc-per-node", "--nnodes")
        return Placement("torchrun", per_node, total // per_node)
    if _in_step(variables):
        tasks, nodes = _tasks_per_node(variables)
        _check_counts(config, tasks, nodes, "srun", "--ntasks-per-node", "--nodes")
        # A step may be smaller than its job, whose numbers Lightning would read.
        variables["SLURM_NTASKS_PER_NODE"], variables["SLURM_NNODES"] = str(tasks), str(nodes)
        return Placement("srun", tasks, nodes)
    if variables.get("SLURM_JOB_ID") and "LOCAL_RANK" not in variables and not _in_shell(variables):
        tasks = environment_number(variables, "SLURM_NTASKS", 1)
        if tasks > 1:
            raise UserError(
                f"this job has {tasks} tasks, but madgen was started once, without srun; run: srun madgen generate ..."
            )
    return _alone(config)


def _alone(config: TrainerConfig) -> Placement:
    nodes = 1 if config.num_nodes == "auto" else config.num_nodes
    if nodes != 1:
        raise UserError(f"trainer.num_nodes={nodes} needs srun or torchrun to start madgen on every node")
    return Placement("alone", config.devices, 1)


def _in_shell(variables: Mapping[str, str]) -> bool:
    """Return whether this is an interactive shell inside an allocation, which is used as on any machine.

    `salloc` runs the shell as a step with a special id. `srun --pty bash` runs it as an ordinary step, with the command
    as the job's name; a step that is started from such a shell inherits the name, but is not attached to the terminal.
    """
    if variables.get("SLURM_STEP_ID") == INTERACTIVE_STEP:
        return True
    if variables.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        return False
    alone = sum(_task_counts(variables)) <= 1
    return "SLURM_STEP_ID" not in variables or alone or ("SLURM_PTY_PORT" in variables and os.isatty(0))


def _in_step(variables: Mapping[str, str]) -> bool:
    return bool(variables.get("SLURM_STEP_ID") and variables.get("SLURM_PROCID")) and not _in_shell(variables)


def _task_counts(variables: Mapping[str, str]) -> list[int]:
    """Return the number of tasks on each node of the step."""
    name = "SLURM_STEP_TASKS_PER_NODE" if variables.get("SLURM_STEP_TASKS_PER_NODE") else "SLURM_TASKS_PER_NODE"
    text = variables.get(name) or "1"
    if not re.fullmatch(rf"{COUNT.pattern}(?:,{COUNT.pattern})*", text, re.ASCII):
        raise UserError(f"the environment variable {name} must be like 2(x3), got {text!r}; unset it")
    return [int(count) for count, times in COUNT.findall(text) for _ in range(int(times or 1))]


def _tasks_per_node(variables: MutableMapping[str, str]) -> tuple[int, int]:
    counts = _task_counts(variables)
    if len(set(counts)) != 1:
        raise UserError(
            f"srun started {' + '.join(map(str, counts))} tasks on {len(counts)} nodes; "
            f"request the same number on each with --ntasks-per-node={max(counts)}, not with --ntasks"
        )
    return counts[0], len(counts)


def _check_counts(
    config: TrainerConfig, devices: int, nodes: int, launcher: str, devices_option: str, nodes_option: str
) -> None:
    for name, value, count, option, unit in (
        ("devices", config.devices, devices, devices_option, "tasks per node"),
        ("num_nodes", config.num_nodes, nodes, nodes_option, "nodes"),
    ):
        if value not in ("auto", count):
            raise UserError(
                f"trainer.{name}={value}, but {launcher} started {count} {unit} ({option}={count}); "
                f"set trainer.{name}=auto, or {option}={value}"
            )


def joins_a_group(config: TrainerConfig) -> bool:
    """Return whether other processes wait for this one, even if nothing is left to do."""
    return "LOCAL_RANK" in os.environ or placement(config).joins_a_group


def device_type(config: TrainerConfig) -> str:
    """Return the type of device that the trainer will use: `cuda` or `cpu`."""
    import torch

    return "cuda" if config.accelerator != "cpu" and torch.cuda.is_available() else "cpu"


def rank(variables: Mapping[str, str] = os.environ) -> int:
    """Return the global rank, also before Lightning is set up; 0 for a single process."""
    if "TORCHELASTIC_RUN_ID" in variables:
        name = "RANK"
    elif _in_step(variables):
        name = "SLURM_PROCID"
    else:
        name = "LOCAL_RANK"  # set by Lightning for the processes that it starts
    return environment_number(variables, name, 0)


def worker_number(variables: Mapping[str, str] = os.environ) -> int:
    """Return a number that spreads workers over the shards: the rank, plus the task of a SLURM array."""
    return rank(variables) + environment_number(variables, "SLURM_ARRAY_TASK_ID", 0)


def strategy(name: str, processes: int) -> Any:
    """Return the strategy to pass to the Trainer: DDP with our own timeout if there is more than one process."""
    if name == "ddp" or (name == "auto" and processes > 1):
        from lightning.pytorch.strategies import DDPStrategy

        return DDPStrategy(process_group_backend=os.environ.get("MADGEN_PROCESS_GROUP", "gloo"), timeout=START_TIMEOUT)
    return name


def lost_process(error: RuntimeError) -> OSError | None:
    """Describe an error because another process has not joined in time, or has died before all had; None for others."""
    import torch

    if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error).lower():
        return None
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".")
    return OSError(errno.ETIMEDOUT, f"another process of this run did not start, or died meanwhile: {reason}")
