"""Stop a run in which too many samples fail, so that a broken node cannot quarantine a whole dataset."""

from __future__ import annotations

from collections import deque

MIN_SAMPLES = 10
"""Samples before the share of failures counts, unless the window is smaller."""


class CircuitBreaker:
    """Trip permanently once more than `max_share` (0..1; 1: never) of the last `window` samples failed."""

    def __init__(self, max_share: float, window: int):
        self.max_share = max_share
        self.tripped: str | None = None
        """The reason, None until it trips."""
        self._failures: deque[bool] = deque(maxlen=window)
        self._min_samples = min(window, MIN_SAMPLES)

    def record(self, failed: bool) -> None:
        """Record the outcome of a sample."""
        self._failures.append(failed)
        count, failures = len(self._failures), sum(self._failures)
        if self.tripped is None and count >= self._min_samples and failures / count > self.max_share:
            self.tripped = (
                f"{failures} of the last {count} samples failed, more than quarantine.max_share={self.max_share} allows"
            )
