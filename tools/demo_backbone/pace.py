"""Training progress by steps or by time, for training with a limited time on a GPU."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

WARM_UP = 200  # steps


class Pace:
    """Iterate over steps until `steps` or `seconds` are reached, whichever comes first.

    The learning rate follows `done`, so that it is annealed in both cases.
    """

    def __init__(self, steps: int, seconds: float = math.inf, step: int = 0):
        self.steps, self.seconds, self.step, self.started = steps, seconds, step, time.monotonic()

    def __iter__(self) -> Iterator[int]:
        while self.done < 1:
            yield self.step
            self.step += 1

    @property
    def done(self) -> float:
        """Progress from 0 to 1."""
        return max(self.step / self.steps, (time.monotonic() - self.started) / self.seconds)

    def rate(self, hold: float = 0.0) -> float:
        """Return the factor of the learning rate: warm-up, 1 until `hold` (0..1), then a cosine down to 0.01."""
        cosine = 0.5 * (1 + math.cos(math.pi * max(0.0, self.done - hold) / (1 - hold)))
        return min(1.0, (self.step + 1) / WARM_UP) * max(cosine, 0.01)

    def report(self, name: str, values: str, every: int = 200) -> None:
        """Print a line every `every` steps."""
        if self.step % every == 0:
            seconds = time.monotonic() - self.started
            print(f"{name} step {self.step}, {100 * self.done:.0f} %, {seconds:.0f} s: {values}", flush=True)
