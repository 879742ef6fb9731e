"""Walltime: no batch is started that cannot end before SLURM ends the job. Pure logic; the clock can be replaced."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import datetime

MARGIN_S = 10.0
"""For what comes after the last batch: it is written, and its shard is read back and published."""
SAFETY = 1.2
RECENT = 8
"""Batches that are looked back at."""


class Walltime:
    """How long batches take, from those that this process has run, and whether another one fits before `end`.

    A batch's cost is in any unit that its time grows with, such as view evaluations.
    """

    def __init__(self, end: float | None, clock: Callable[[], float] = time.time):
        self.clock = clock
        self.end = end if end is not None and end > clock() else None
        """Seconds since 1970; None: no limit, or none that is known."""
        self._rates: deque[float] = deque(maxlen=RECENT)
        self._first: float | None = None  # slower than the others: it warms up

    def record(self, cost: float, seconds: float) -> None:
        """A batch of `cost` took so long."""
        if cost <= 0:
            return
        if self._first is None:
            self._first = seconds / cost
        else:
            self._rates.append(seconds / cost)

    def expected(self, cost: float) -> float:
        """Seconds that a batch of `cost` may take; 0 before anything was measured."""
        if not self._rates:
            return cost * (self._first or 0.0)
        slow = max(statistics.median(self._rates) * SAFETY, max(self._rates))
        return cost * slow

    def refuses(self, cost: float) -> str | None:
        """Why a batch of `cost` must not be started now, in a line; None if it may. With 0: whether to wait on."""
        if self.end is None:
            return None
        left, needed = self.end - self.clock(), self.expected(cost)
        if needed + MARGIN_S <= left:
            return None
        takes = f"the next batch may take {needed:.0f} s" if cost else "nothing more can be done in it"
        return f"the job's time ends in {max(0.0, left):.0f} s and {takes}: stopping"


def job_end(environment: Mapping[str, str] = os.environ) -> float | None:
    """When SLURM ends this job, in seconds since 1970; None where there is no such end.

    `MADGEN_END_TIME` says it without SLURM; where newer versions of SLURM do not say it either, `squeue` is asked.
    """
    for name in ("MADGEN_END_TIME", "SLURM_JOB_END_TIME"):
        if environment.get(name):
            try:
                return float(environment[name])
            except ValueError:
                return None
    if "MADGEN_END_TIME" in environment or "SLURM_JOB_ID" not in environment:
        return None
    try:
        command = ["squeue", "-h", "-j", environment["SLURM_JOB_ID"], "-o", "%e"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return datetime.fromisoformat(said.split()[0]).timestamp()
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
