"""Signal handlers: SIGTERM, SIGINT and SIGUSR1 stop after the batch in flight; a second SIGINT stops at once."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignals:
    """Replace Lightning's handlers: its predict loop ignores SIGTERM, and its SIGUSR1 handler requeues the job."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}
        self._stop: Callable[[], None] = lambda: None

    @property
    def preempting(self) -> bool:
        """Return whether the scheduler reclaims the machine, rather than the user ending the run."""
        return self.received in (signal.SIGTERM, signal.SIGUSR1)

    def install(self, stop: Callable[[], None]) -> None:
        """Call `stop` on each signal from now on, if this is the main thread. May be called again."""
        self._stop = stop
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._previous.setdefault(number, signal.signal(number, self._handle))

    def restore(self) -> None:
        """Restore the previous handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        self._stop()
        logger.info("\n%s: finishing the batch in flight, then stopping", signal.Signals(number).name)


def exit_before_start() -> None:
    """Exit with the status of an early stop if SIGTERM or SIGUSR1 arrives before the run has started."""
    exit_on_signals("stopped before it began", leave=os._exit)  # an exception during an import could be swallowed


def exit_on_signals(message: str, *more: int, leave: Callable[[int], object] = sys.exit) -> None:
    """Exit at once, with a message and the status of an early stop, on SIGTERM, SIGUSR1 and the signals `more`."""

    def end(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGINT:
            request_requeue("signal")
        logger.info("%s: %s", signal.Signals(number).name, message)
        leave(3)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGUSR1, *more):
            signal.signal(number, end)


@contextlib.contextmanager
def exiting_on_signals(message: str) -> Iterator[None]:
    """Apply `exit_on_signals` inside the block, then restore the previous handlers."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    exit_on_signals(message)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def request_requeue(reason: str) -> None:
    """Write the reason to the file that `slurm/*.sbatch` watch: they requeue the job when all ranks have ended."""
    if path := os.environ.get("MADGEN_STOPPED"):
        with contextlib.suppress(OSError):
            Path(path).write_text(f"{reason}\n", encoding="utf-8")
