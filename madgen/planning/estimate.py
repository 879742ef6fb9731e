"""How long what is left of a plan will take, from what finished shards tell. Loads no weights, writes nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from madgen.dataset.layout import DatasetDir
from madgen.planning.cost import Evaluations, prompt_evaluations
from madgen.planning.order import makespan, shard_costs
from madgen.planning.resolved_run import ResolvedRun
from madgen.utils.errors import UserError

BUSY = ("sample", "decode", "safety", "wait")
"""What a worker's time goes into; `write` runs beside it."""
LOOK_AT = 200
"""Finished shards that are looked at, evenly spaced."""


@dataclass(frozen=True)
class Measured:
    """Worker seconds and view evaluations of finished shards, of whatever devices made them."""

    seconds: float
    view_evaluations: int
    shards: int

    @property
    def seconds_per_evaluation(self) -> float:
        return self.seconds / self.view_evaluations


@dataclass(frozen=True)
class Outlook:
    """What is left to do, in worker seconds. A worker is one process with its device."""

    measured: Measured | None
    missing: list[float]
    """View evaluations of each shard that is not done."""

    @property
    def rate(self) -> float:
        """Worker seconds a view evaluation; UserError if nothing was measured."""
        if self.measured is None:
            raise UserError(
                "no finished shard tells how long a panorama takes here; make some first on such a device, as in "
                "`madgen generate JOB.yaml prompts.limit=8 output.dir=out/trial`, and give --measured out/trial"
            )
        return self.measured.seconds_per_evaluation

    @property
    def measured_shards(self) -> int:
        return self.measured.shards if self.measured else 0

    @property
    def device_hours(self) -> float:
        return sum(self.missing) * self.rate / 3600

    def wall_s(self, workers: int) -> float:
        """Seconds until everything is made, without start-up, by so many workers of the measured speed."""
        return makespan(self.missing, workers) * self.rate

    def fewest_workers(self, within_s: float) -> int:
        """How many workers need no longer than `within_s`; UserError if a single shard takes longer."""
        longest = max(self.missing, default=0.0) * self.rate
        if longest > within_s:
            raise UserError(
                f"one shard takes {longest / 60:.0f} min, and there are {max(0.0, within_s) / 60:.0f} min to sample; "
                "lower output.samples_per_shard, or give more --time"
            )
        low, high = 1, max(1, len(self.missing))
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.wall_s(middle) <= within_s else (middle + 1, high)
        return low

    def told(self, workers: int | None) -> dict[str, Any]:
        """For `plan --json`; None for what nothing was measured for."""
        known = self.measured is not None
        return {
            "shards_left": len(self.missing),
            "view_evaluations_left": int(sum(self.missing)),
            "seconds_per_view_evaluation": self.rate if known else None,
            "measured_shards": self.measured_shards,
            "device_hours_left": self.device_hours if known else None,
            "workers": workers,
            "wall_s": self.wall_s(workers) if known and workers is not None else None,
        }


def outlook(run: ResolvedRun, evaluations: Mapping[tuple[int, int], Evaluations], measured: Path | None) -> Outlook:
    """Estimate the remaining work; the throughput is that of `measured`, or else of the run's own dataset."""
    costs, done = shard_costs(run.plan, partial(prompt_evaluations, evaluations)), run.directory.done()
    missing = [cost for name, cost in zip(run.shard_names, costs, strict=True) if name not in done]
    return Outlook(measure(measured or run.directory.root, required=measured is not None), missing)


def measure(folder: Path, required: bool = False) -> Measured | None:
    """What the finished shards of a dataset took; None without any that tells, or UserError if it is `required`."""
    directory = DatasetDir(folder)
    names = sorted(directory.done())
    spread = names[:: math.ceil(len(names) / LOOK_AT) or 1]
    told = [sidecar for sidecar in map(directory.read_sidecar, spread) if sidecar.view_evaluations]
    if not told:
        if required:
            raise UserError(f"--measured={folder} has no finished shard that tells how long its panoramas took")
        return None
    seconds = sum(sidecar.seconds.get(name, 0.0) for sidecar in told for name in BUSY)
    return Measured(seconds, sum(sidecar.view_evaluations or 0 for sidecar in told), len(told))
