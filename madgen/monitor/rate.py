"""Panoramas a second over the last minutes."""

from __future__ import annotations

import time
from collections import deque

WINDOW_S = 300.0


class Rate:
    """Counts what was made; the rate is that of a sliding window."""

    def __init__(self, window_s: float = WINDOW_S):
        self.window_s, self.total = window_s, 0
        self._marks: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])

    def add(self, count: int) -> None:
        """`count` more are made."""
        self.total += count
        now = time.monotonic()
        self._marks.append((now, self.total))
        while len(self._marks) > 2 and self._marks[0][0] < now - self.window_s:
            self._marks.popleft()

    def per_second(self) -> float | None:
        """Over the window; None before anything is made."""
        (first, before), (last, after) = self._marks[0], self._marks[-1]
        return (after - before) / (last - first) if after > before and last > first else None
