"""SIGTERM, SIGINT and SIGUSR1 finish the batch in flight and stop; a second SIGINT stops at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from madgen.utils.console import say

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignals:
    """Handlers of our own in place of Lightning's, whose SIGTERM is ignored by predict and whose SIGUSR1 requeues."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}
        self._stop: Callable[[], None] = lambda: None

    @property
    def preempting(self) -> bool:
        """Whether the machine is wanted back, rather than the run ended by its user."""
        return self.received in (signal.SIGTERM, signal.SIGUSR1)

    def install(self, stop: Callable[[], None]) -> None:
        """Calls `stop` on the first signal; only possible in the main thread. May be called again."""
        self._stop = stop
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                self._previous.setdefault(number, signal.signal(number, self._handle))

    def restore(self) -> None:
        """Puts the handlers back that were there before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        self._stop()
        say(f"\n{signal.Signals(number).name}: finishing the batch in flight, then stopping")


def end_before_it_begins() -> None:
    """Until a run takes over, SIGTERM and SIGUSR1 end this process as an early stop, of which nothing is lost."""
    end_instead("stopped before it began", leave=os._exit)  # an exception would be lost where modules are imported


def end_instead(said: str, *more: int, leave: Callable[[int], None] = sys.exit) -> None:
    """SIGTERM, SIGUSR1 and `more` end this process at once, as an early stop."""

    def end(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGINT:
            tell_batch_script("signal")
        say(f"{signal.Signals(number).name}: {said}")
        leave(3)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGUSR1, *more):
            signal.signal(number, end)


@contextlib.contextmanager
def ending_instead(said: str) -> Iterator[None]:
    """`end_instead` within it; then the handlers of before."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    end_instead(said)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def tell_batch_script(reason: str) -> None:
    """That a restart would go on, in the file that `slurm/*.sbatch` name: they requeue, once no rank runs any more."""
    if path := os.environ.get("MADGEN_STOPPED"):
        with contextlib.suppress(OSError):
            Path(path).write_text(f"{reason}\n")
