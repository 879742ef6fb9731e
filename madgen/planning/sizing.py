"""`submit` with `--nodes auto` or `--time auto`: what to ask SLURM for, from a plan's outlook."""

from __future__ import annotations

import math
from dataclasses import replace

from madgen.cluster.sbatch import TIME, Resources
from madgen.planning.estimate import Outlook
from madgen.utils.errors import UserError

AUTO = "auto"
START_S = 600
"""For what comes before the first panorama: modules, imports, weights from a file system that is busy."""
SLACK = 1.25
"""Panoramas take longer on some nodes than where they were measured."""
STEP_S = 300


def pick(resources: Resources, outlook: Outlook, nodes: str, time: str | None) -> tuple[Resources, str]:
    """The resources with what was `auto` filled in, and why, in a line."""
    rate = f"{1000 * outlook.rate:.3g} ms a view evaluation on {outlook.measured_shards} measured shards"
    left = f"{len(outlook.missing)} shards are left, {outlook.device_hours:.2f} device hours at {rate}"
    if nodes == AUTO:
        if resources.time is None:
            raise UserError(f"--nodes={AUTO} needs a time to be done in: --time 24:00:00")
        if resources.array is not None:
            raise UserError(f"--nodes={AUTO} does not go with --array, whose tasks take one node each")
        picked = nodes_within(outlook, resources.time, resources.tasks)
        return replace(resources, nodes=picked), f"{left}: --nodes={picked}"
    picked_time = time_for(outlook, resources.at_once)
    return replace(resources, time=picked_time), f"{left}: --time={picked_time}"


def count(option: str, text: str) -> int | None:
    """A number of things, None for `auto`; UserError for anything else."""
    if text == AUTO:
        return None
    if not text.isascii() or not text.removeprefix("-").isdigit():
        raise UserError(f"{option} must be a number or {AUTO}, got {text!r}")
    return int(text)


def seconds(time: str) -> int:
    """Of a time as SLURM writes it: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]."""
    if not TIME.fullmatch(time):
        raise UserError(f"--time must be like 24:00:00 or 2-12:00:00 (days-hours), got {time!r}")
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, left = [*parts, 0, 0][:3]
    elif len(parts) < 3:
        hours, (minutes, left) = 0, [*parts, 0][:2]
    else:
        hours, minutes, left = parts
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + left


def nodes_within(outlook: Outlook, time: str, tasks_per_node: int) -> int:
    """The fewest nodes that make what is left within `time`."""
    return math.ceil(outlook.fewest_workers((seconds(time) - START_S) / SLACK) / tasks_per_node)


def time_for(outlook: Outlook, workers: int) -> str:
    """`H:MM:SS` that is enough for so many workers to make what is left, in steps of five minutes."""
    needed = START_S + SLACK * outlook.wall_s(workers)
    minutes = math.ceil(needed / STEP_S) * STEP_S // 60
    return f"{minutes // 60:02d}:{minutes % 60:02d}:00"
