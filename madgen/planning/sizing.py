"""`submit` with `--nodes auto` or `--time auto`: choose SLURM resources from an estimate."""

from __future__ import annotations

import math
from dataclasses import replace

from madgen.cluster.sbatch import Resources
from madgen.planning.wall_time import Estimate
from madgen.utils.console import plural
from madgen.utils.errors import UserError

AUTO = "auto"
START_S = 600
"""Allowance for the start: modules, imports, weights from a busy file system."""
SLACK = 1.25
"""Allowance for nodes that are slower than the measured ones."""
STEP_S = 300
"""Requested times are multiples of this."""


def choose_resources(resources: Resources, estimate: Estimate, nodes: str, time: str | None) -> tuple[Resources, str]:
    """Return the resources with `auto` filled in, and a line that explains the choice."""
    rate = f"{1000 * estimate.rate:.3g} ms per view evaluation on {plural(estimate.measured_shards, 'measured shard')}"
    left = f"{plural(len(estimate.missing), 'shard')} left, {estimate.device_hours:.2f} device hours at {rate}"
    if nodes == AUTO:
        if resources.time is None:
            raise UserError(f"--nodes={AUTO} needs a time limit, for example --time 24:00:00")
        if resources.array is not None:
            raise UserError(f"--nodes={AUTO} cannot be combined with --array, whose tasks take one node each")
        chosen = nodes_within(estimate, resources.time, resources.tasks)
        return replace(resources, nodes=chosen), f"{left}: --nodes={chosen}"
    chosen_time = time_for(estimate, resources.at_once)
    return replace(resources, time=chosen_time), f"{left}: --time={chosen_time}"


def parse_count(option: str, text: str) -> int | None:
    """Parse a number; None for `auto`."""
    if text == AUTO:
        return None
    if not text.isascii() or not text.removeprefix("-").isdigit():
        raise UserError(f"{option} must be a whole number or {AUTO}, got {text!r}")
    return int(text)


def parse_time(time: str) -> int:
    """Convert a time that `Resources` accepts to seconds.

    SLURM's formats are minutes[:seconds], hours:minutes:seconds and days-hours[:minutes[:seconds]].
    """
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, left = [*parts, 0, 0][:3]
    elif len(parts) < 3:
        hours, (minutes, left) = 0, [*parts, 0][:2]
    else:
        hours, minutes, left = parts
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + left


def nodes_within(estimate: Estimate, time: str, tasks_per_node: int) -> int:
    """Return the smallest number of nodes that finish within `time`."""
    return math.ceil(estimate.fewest_workers((parse_time(time) - START_S) / SLACK) / tasks_per_node)


def time_for(estimate: Estimate, workers: int) -> str:
    """Return the time limit, `HH:MM:SS`, for the rest of a plan on a number of workers."""
    needed = START_S + SLACK * estimate.wall_s(workers)
    minutes = math.ceil(needed / STEP_S) * STEP_S // 60
    return f"{minutes // 60:02d}:{minutes % 60:02d}:00"
