"""Time limits: start no batch that cannot end before SLURM ends the job."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import datetime

MARGIN_S = 10.0
"""Reserve after the last batch, to write it and to verify and publish its shard."""
SAFETY = 1.2
"""Factor on the median duration of a batch."""
RECENT = 8
"""Number of batches in the median."""


class Walltime:
    """Predict the duration of batches from those that this process has run.

    The cost of a batch is in any unit that its duration is proportional to, such as view evaluations.
    """

    def __init__(self, end: float | None, clock: Callable[[], float] = time.time):
        self.clock = clock
        self.end = end if end is not None and end > clock() else None
        """Seconds since the epoch; None: no known limit."""
        self._rates: deque[float] = deque(maxlen=RECENT)
        self._first: float | None = None  # slower than the others: warm-up

    def record(self, cost: float, seconds: float) -> None:
        """Record the duration of a batch."""
        if cost <= 0:
            return
        if self._first is None:
            self._first = seconds / cost
        else:
            self._rates.append(seconds / cost)

    def expected(self, cost: float) -> float:
        """Return the seconds that a batch of `cost` may take; 0 before the first measurement."""
        if not self._rates:
            return cost * (self._first or 0.0)
        slow = max(statistics.median(self._rates) * SAFETY, max(self._rates))
        return cost * slow

    def refuses(self, cost: float) -> str | None:
        """Return why a batch of `cost` must not start now (0: why not to wait longer), or None if it may."""
        if self.end is None:
            return None
        left, needed = self.end - self.clock(), self.expected(cost)
        if needed + MARGIN_S <= left:
            return None
        takes = f"the next batch may take {needed:.0f} s" if cost else "no other batch fits"
        return f"the job's time ends in {max(0.0, left):.0f} s and {takes}: stopping"


def job_end(environment: Mapping[str, str] = os.environ) -> float | None:
    """Return when SLURM ends this job, in seconds since the epoch; None without a time limit.

    The sources, in order: `MADGEN_END_TIME`, `SLURM_JOB_END_TIME` (recent versions of SLURM), `squeue`.
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
        output = subprocess.run(command, capture_output=True, timeout=20, check=True).stdout
        return datetime.fromisoformat(output.split()[0].decode()).timestamp()
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
