"""Panoramas a second over the last minutes."""

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
    """Counts what was made; the rate is that of a sliding window, without the first batch, which warms up.

    One thread counts, others ask.
    """

    def __init__(self, window_s: float = WINDOW_S, clock: Callable[[], float] = time.monotonic):
        self.window_s, self.clock, self.total = window_s, clock, 0
        self._lock = threading.Lock()
        self.begin()

    def begin(self) -> None:
        """Work begins now: what came before, such as loading a model, does not count."""
        with self._lock:
            self._marks = deque([(self.clock(), self.total)])
            self._is_warm = False

    def add(self, count: int) -> None:
        """`count` more are made; once a batch."""
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
        """Over the window; None before anything is made. It falls when the next batch is overdue."""
        with self._lock:
            (first, before), (last, after), steps = self._marks[0], self._marks[-1], len(self._marks) - 1
        if after == before or last <= first:
            return None
        usual = (last - first) / steps
        return (after - before) / max(last - first, self.clock() - usual - first)

    def error(self) -> float | None:
        """Two standard errors of the rate, as a share of it; None before three batches of the window."""
        with self._lock:
            marks = tuple(self._marks)
        each = [(then - at) / (after - before) for (at, before), (then, after) in pairwise(marks) if after > before]
        if len(each) < 3:
            return None
        return 2 * statistics.stdev(each) / statistics.mean(each) / math.sqrt(len(each))
