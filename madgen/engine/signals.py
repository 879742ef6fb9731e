"""SIGTERM, SIGINT and SIGUSR1 finish the batch in flight and stop; a second SIGINT stops at once."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignals:
    """Handlers of our own in place of Lightning's, whose SIGTERM is ignored by predict and whose SIGUSR1 requeues."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}
        self._stop: Callable[[], None] = lambda: None

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
        name = signal.Signals(number).name
        print(f"\n{name}: finishing the batch in flight, then stopping", file=sys.stderr, flush=True)
        self._stop()
