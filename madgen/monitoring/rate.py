"""Measure the throughput of one worker over the last minutes."""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import pairwise

WINDOW_S = 300.0


class Rate:
    """Throughput over a sliding window, without the first batch (warm-up).

    One thread counts; any thread may read.
    """

    def __init__(self, window_s: float = WINDOW_S, clock: Callable[[], float] = time.monotonic):
        self.window_s, self.clock, self.total = window_s, clock, 0
        self._lock = threading.Lock()
        self.begin()

    def begin(self) -> None:
        """Start the measurement, after loading the model and other preparations."""
        with self._lock:
            self._marks = deque([(self.clock(), self.total)])
            self._is_warm = False

    def add(self, count: int) -> None:
        """Count the samples of a batch."""
        with self._lock:
            self.total += count
            now = self.clock()
            self._marks.append((now, self.total))
            if not self._is_warm and len(self._marks) == 4:
                self._marks.popleft()
                self._is_warm = True
            while len(self._marks) > 2 and self._marks[0][0] < now - self.window_s:
                self._marks.popleft()

    def per_second(self) -> float | None:
        """Return samples per second over the window; None before the first. Falls while the next batch is overdue."""
        with self._lock:
            (first, before), (last, after), steps = self._marks[0], self._marks[-1], len(self._marks) - 1
        if after == before or last <= first:
            return None
        usual = (last - first) / steps
        return (after - before) / max(last - first, self.clock() - usual - first)

    def error(self) -> float | None:
        """Return two standard errors relative to the rate; None before three batches."""
        with self._lock:
            marks = tuple(self._marks)
        durations = [
            (then - at) / (after - before) for (at, before), (then, after) in pairwise(marks) if after > before
        ]
        if len(durations) < 3:
            return None
        return 2 * statistics.stdev(durations) / statistics.mean(durations) / math.sqrt(len(durations))
