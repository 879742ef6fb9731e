"""`monitor` and `trainer`: how a run is watched and distributed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from madgen.config.schema.checks import check, check_one_of, quoted

WANDB_MODES = ("online", "offline", "disabled")


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Logging to Weights & Biases."""

    mode: str | None = None
    """`online`, `offline` (log to `wandb/` in the current directory; upload with `wandb sync`) or `disabled`; null:
    the environment variable `WANDB_MODE`, else `offline`."""
    project: str | None = None
    """Name of the W&B project; null: the environment variable `WANDB_PROJECT`, else `madgen`."""
    entity: str | None = None
    """W&B user or team; null: the environment variable `WANDB_ENTITY`, else the account's default."""
    group: str | None = None
    """Group of runs that this run belongs to; null: the environment variable `WANDB_RUN_GROUP`, else none."""
    id: str | None = None
    """Run id; null: the environment variable `WANDB_RUN_ID`, else derived from the dataset's directory, so that a
    resumed run continues the same curve."""

    def __post_init__(self) -> None:
        check(
            self.mode is None or self.mode in WANDB_MODES,
            f"monitor.wandb.mode must be one of "
            f"{', '.join(WANDB_MODES)}, or null for WANDB_MODE of the environment, got {self.mode!r}",
        )

    def chosen_mode(self, variables: Mapping[str, str] = os.environ) -> str:
        """Return the mode. Raises UserError if `WANDB_MODE` of the environment decides and is invalid."""
        if self.mode is not None:
            return self.mode
        if variables.get("WANDB_DISABLED", "").lower() in ("true", "1"):
            return "disabled"
        mode = variables.get("WANDB_MODE") or "offline"
        mode = {"dryrun": "offline", "run": "online"}.get(mode, mode)  # as W&B names them too
        check_one_of("the environment variable WANDB_MODE", mode, WANDB_MODES)
        return mode


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """Monitoring of a run."""

    wandb: WandbConfig = field(default_factory=WandbConfig)
    preview_every: int = 100
    """Log a preview image to W&B after every `preview_every` samples, >= 0; 0: none."""

    def __post_init__(self) -> None:
        check(self.preview_every >= 0, f"monitor.preview_every must be >= 0 samples, got {self.preview_every}")


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Arguments of `lightning.Trainer`."""

    accelerator: str = "auto"
    """`cpu`, or `gpu` (also `cuda`) for NVIDIA GPUs; `auto` is the GPU if there is one."""
    devices: Any = "auto"
    """Number of processes on each node, one per device, > 0. `auto` follows `srun` or `torchrun`, or else uses all GPUs
    of this machine."""
    num_nodes: Any = "auto"
    """Number of nodes, > 0. `auto` follows `srun` or `torchrun`; 1 without them."""
    strategy: str = "auto"
    """Strategy of Lightning; `auto` is DDP if there is more than one process."""

    def __post_init__(self) -> None:
        check_one_of("trainer.accelerator", self.accelerator, ("auto", "cpu", "gpu", "cuda"))
        for name in ("devices", "num_nodes"):
            value = getattr(self, name)
            check(
                value == "auto" or (type(value) is int and value > 0),
                f"trainer.{name} must be an integer > 0 or auto, got {quoted(value)}",
            )
