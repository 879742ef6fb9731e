"""How far training is: by steps, or by the clock where a GPU is only there for some minutes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

WARM_UP = 200  # steps


class Pace:
    """Iterates over steps until `steps` are made or `seconds` have passed, whichever comes first.

    The learning rate follows `done`, so that a run that the clock ends has cooled down as well.
    """

    def __init__(self, steps: int, seconds: float = math.inf):
        self.steps, self.seconds, self.step, self.started = steps, seconds, 0, time.monotonic()

    def __iter__(self) -> Iterator[int]:
        while self.done < 1:
            yield self.step
            self.step += 1

    @property
    def done(self) -> float:
        """0 at the start, 1 at the end."""
        return max(self.step / self.steps, (time.monotonic() - self.started) / self.seconds)

    def rate(self, hold: float = 0.0) -> float:
        """Share of the learning rate: a warm-up, `hold` of the way at 1, then half a cosine down to a hundredth."""
        cosine = 0.5 * (1 + math.cos(math.pi * max(0.0, self.done - hold) / (1 - hold)))
        return min(1.0, (self.step + 1) / WARM_UP) * max(cosine, 0.01)

    def report(self, name: str, values: str, every: int = 200) -> None:
        """A line now and then."""
        if self.step % every == 0:
            seconds = time.monotonic() - self.started
            print(f"{name} step {self.step}, {100 * self.done:.0f} %, {seconds:.0f} s: {values}", flush=True)
