"""Signal handlers: SIGTERM, SIGINT and SIGUSR1 stop after the batch in flight; a second SIGINT stops at once."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STOPPED = "stopped; rerun the same command"
"""Message for commands that start again from the beginning."""
RESUMABLE = f"{STOPPED} to resume"
"""Message for commands that continue where they stopped."""


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


def early_stop_status() -> int:
    """Return the exit status of a stopped process: 3, but 0 for ranks that another process has launched.

    Lightning and torchrun kill all other ranks at once if one that they launched ends with anything but 0.
    """
    return 3 if os.environ.get("LOCAL_RANK", "") in ("", "0") else 0


def exit_before_start() -> None:
    """Exit at once if a signal arrives before sampling, with one line and the status of an early stop.

    Python's handlers run only between two instructions of the main thread, which may wait in native code for another
    rank to start. Therefore a thread acts on signals too. It leaves the process without an exception, which an import
    could swallow.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    ending = threading.Lock()

    def end(number: int, frame: FrameType | None) -> None:
        if ending.acquire(blocking=False):
            _log_stop(number, STOPPED)
            _terminate_children()
            os._exit(early_stop_status())

    def watch() -> None:
        while numbers := reader.recv(64):  # empty: replaced by a later call
            for number in set(numbers) & {int(number) for number in STOP_SIGNALS}:
                if signal.getsignal(number) is end:
                    end(number, None)

    reader, writer = socket.socketpair()
    writer.setblocking(False)
    _wakeup_sockets[:] = [reader, writer]  # the number of each signal is written there
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=watch, name="signals", daemon=True).start()
    for number in STOP_SIGNALS:
        signal.signal(number, end)


_wakeup_sockets: list[socket.socket] = []


def _terminate_children() -> None:
    """Send SIGTERM to the processes that this one has started: they would wait for it."""
    import psutil

    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            child.terminate()


def _log_stop(number: int, message: str) -> None:
    """Log why this process ends (rank 0 only), and request a requeue unless the user has interrupted it."""
    if number != signal.SIGINT:
        request_requeue("signal")
    if early_stop_status():
        logger.info("%s: %s", signal.Signals(number).name, message)


def exit_on_signals(message: str) -> None:
    """Exit with a message and the status of an early stop on SIGTERM, SIGINT and SIGUSR1.

    By an exception, so that temporary files are removed. Python ignores exceptions in finalizers, so the signal is sent
    again after one.
    """
    received: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        if not received:
            _log_stop(number, message)
        received.append(number)
        sys.exit(early_stop_status())

    def ignored(unraisable: Any) -> None:
        if unraisable.exc_type is not SystemExit or not received:
            sys.__unraisablehook__(unraisable)
            return
        again = threading.Timer(0.02, os.kill, (os.getpid(), received[-1]))
        again.daemon = True
        again.start()

    if threading.current_thread() is threading.main_thread():
        sys.unraisablehook = ignored
        for number in reversed(STOP_SIGNALS):  # SIGTERM last: who sees its handler may send any of them
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
