"""Stops a run of which too much fails: a broken node must not quarantine a whole dataset."""

from __future__ import annotations

from collections import deque

LEAST = 10
"""Samples that are seen before the share of failures says anything, unless the window is smaller."""


class Breaker:
    """Trips when more than `max_share` (0..1) of the last `window` samples failed, and stays so. 1: never trips."""

    def __init__(self, max_share: float, window: int):
        self.max_share = max_share
        self.tripped: str | None = None
        """Why, in a sentence; None while all is well."""
        self._failures: deque[bool] = deque(maxlen=window)
        self._least = min(window, LEAST)

    def record(self, failed: bool) -> None:
        """One sample came to its end."""
        self._failures.append(failed)
        seen, failures = len(self._failures), sum(self._failures)
        if self.tripped is None and seen >= self._least and failures / seen > self.max_share:
            self.tripped = (
                f"{failures} of the last {seen} samples failed, more than quarantine.max_share={self.max_share} allows"
            )
