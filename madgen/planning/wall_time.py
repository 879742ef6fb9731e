"""Estimate the time that the rest of a plan takes, from finished shards. Loads no weights, writes nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from madgen.dataset.layout import DatasetDir
from madgen.dataset.shards.journal import count_open_samples
from madgen.planning.cost import prompt_evaluations
from madgen.planning.order import makespan, shard_costs
from madgen.planning.shapes import Shapes
from madgen.utils.errors import UserError

BUSY = ("sample", "decode", "safety", "wait")
"""Timings of a sidecar that add up to a worker's time; `write` runs in parallel."""
MAX_MEASURED = 200
"""Finished shards that are read, evenly spaced."""


@dataclass(frozen=True)
class Measured:
    """Throughput of finished shards."""

    seconds_per_evaluation: float
    """Worker seconds per view evaluation."""
    shards: int


@dataclass(frozen=True)
class Estimate:
    """Remaining work of a plan. A worker is one process with its device."""

    measured: Measured | None
    missing: list[float]
    """View evaluations of each unfinished shard."""
    kept: int = 0
    """Panoramas that unfinished shards have already."""

    @property
    def rate(self) -> float:
        """Worker seconds per view evaluation. Raises UserError without a finished shard."""
        if self.measured is None:
            raise UserError(
                "no finished shard to take the throughput from; generate a few panoramas on such a device with "
                "`madgen generate JOB.yaml prompts.limit=8 output.dir=out/trial`, then pass --measured out/trial"
            )
        return self.measured.seconds_per_evaluation

    @property
    def measured_shards(self) -> int:
        return self.measured.shards if self.measured else 0

    @property
    def device_hours(self) -> float:
        return sum(self.missing) * self.rate / 3600

    def wall_s(self, workers: int) -> float:
        """Return the wall time for a number of workers of the measured speed, without start-up."""
        return makespan(self.missing, workers) * self.rate

    def fewest_workers(self, within_s: float) -> int:
        """Return the smallest number of workers that finish in time. Raises UserError if one shard takes longer."""
        longest = max(self.missing, default=0.0) * self.rate
        if longest > within_s:
            raise UserError(
                f"one shard takes {longest / 60:.0f} min, but only {max(0.0, within_s) / 60:.0f} min are left; "
                "lower output.samples_per_shard or raise --time"
            )
        low, high = 1, max(1, len(self.missing))
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.wall_s(middle) <= within_s else (middle + 1, high)
        return low

    def as_dict(self, workers: int | None) -> dict[str, Any]:
        """Return the fields of `plan --json`; None where nothing was measured."""
        known = self.measured is not None
        return {
            "shards_left": len(self.missing),
            "samples_kept": self.kept,
            "view_evaluations_left": int(sum(self.missing)),
            "seconds_per_view_evaluation": self.rate if known else None,
            "measured_shards": self.measured_shards,
            "device_hours_left": self.device_hours if known else None,
            "workers": workers,
            "wall_s": self.wall_s(workers) if known and workers is not None else None,
        }


def estimate(shapes: Shapes, measured: Path | None) -> Estimate:
    """Estimate the remaining work; the throughput is that of `measured`, or else of the run's own dataset."""
    run = shapes.run
    costs, done = shard_costs(run.plan, partial(prompt_evaluations, shapes.evaluations)), run.directory.done()
    missing = [cost for name, cost in zip(run.shard_names, costs, strict=True) if name not in done]
    throughput = measure(measured or run.directory.root, required=measured is not None)
    return Estimate(throughput, missing, count_open_samples(run.directory, done))


def measure(folder: Path, required: bool = False) -> Measured | None:
    """Read the throughput of a dataset's finished shards; None, or UserError if `required`, if there is none."""
    directory = DatasetDir(folder)
    names = sorted(directory.done())
    spread = names[:: math.ceil(len(names) / MAX_MEASURED) or 1]
    timed = [sidecar for sidecar in map(directory.read_sidecar, spread) if sidecar.view_evaluations]
    if not timed:
        if required:
            raise UserError(f"--measured={folder} has no finished shard with timings; generate panoramas there first")
        return None
    seconds = sum(sidecar.seconds.get(name, 0.0) for sidecar in timed for name in BUSY)
    return Measured(seconds / sum(sidecar.view_evaluations or 0 for sidecar in timed), len(timed))
