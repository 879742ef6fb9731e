"""Uploading beside the sampling: one thread, which may fail as long as it likes without anybody waiting for it."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable

from madgen.dataset.layout import DatasetDir
from madgen.dataset.remote.filesystem import told
from madgen.dataset.remote.push import Push, UnsentError, open_remote
from madgen.utils.console import say
from madgen.utils.errors import UserError

PAUSE_S = 30.0
"""After a shard that could not be sent; it is tried again after the others."""
TELL_EVERY_S = 30.0


class BackgroundUpload:
    """Sends the shards that this process publishes, in turn; what is left in the end is for `push`."""

    def __init__(self, directory: DatasetDir, url: str):
        self.directory, self.url = directory, url
        self._thread: threading.Thread | None = None
        self._begin()

    def _begin(self) -> None:
        self._queue: queue.Queue[str | None] = queue.Queue()
        self._stopping, self._finishing = threading.Event(), threading.Event()
        self._fails = False

    def start(self, sweep: Callable[[], bool] = lambda: False) -> None:
        """Begins; where `sweep` is true also with finished shards that processes before this one left unsent."""
        self._begin()
        own = self._queue, self._stopping, self._finishing  # an interrupted run's thread may still live, with its own
        self._thread = threading.Thread(target=self._work, args=(sweep, *own), name="upload", daemon=True)
        self._thread.start()

    def add(self, shard: str) -> None:
        """A shard is published."""
        self._queue.put(shard)

    def finish(self, stopped: Callable[[], bool]) -> None:
        """Waits until all is sent, or what is left has failed once more, or `stopped`; says how far it is."""
        self._finishing.set()
        self._queue.put(None)
        due = time.monotonic() + 1
        while self._thread is not None and self._thread.is_alive() and not stopped():
            self._thread.join(0.2)
            if time.monotonic() >= due and (left := self._queue.qsize()):
                say(f"uploading to {self.url}: {left} {'shards' if left > 1 else 'shard'} to go")
                due = time.monotonic() + TELL_EVERY_S
        self.stop()

    def stop(self) -> None:
        """Nothing more is sent; nobody waits for what is being sent just now."""
        self._stopping.set()
        self._queue.put(None)
        self._thread = None

    def _work(
        self,
        sweep: Callable[[], bool],
        todo: queue.Queue[str | None],
        stopping: threading.Event,
        finishing: threading.Event,
    ) -> None:
        try:
            sender = Push(self.directory, open_remote("output.upload", self.url), stopping)
        except UserError as error:
            return say(f"madgen: {error}")
        with contextlib.suppress(UnsentError, OSError):
            if sweep():
                listing = sender.listing()
                for left in sorted(self.directory.done()):
                    if not {f"shards/{left}.tar", f"shards/{left}.json"} <= listing.keys():
                        todo.put(left)
        while (shard := todo.get()) is not None and not stopping.is_set():
            if not self._send(sender, shard) and not finishing.wait(PAUSE_S):
                todo.put(shard)
        return None

    def _send(self, sender: Push, shard: str) -> bool:
        """Whether there is nothing left to do for it."""
        if not self.directory.is_done(shard):  # put back on the list meanwhile
            return True
        try:
            sender.shard(shard)
        except Exception as error:  # nothing that happens here may stop a run
            why = str(error) if isinstance(error, UnsentError) else told(error)
            if not self._fails and not sender.stopping.is_set():
                say(f"madgen: cannot upload to {self.url}: {why}; sampling goes on, and it is tried again")
            self._fails = True
            return False
        if self._fails:
            say(f"madgen: uploading to {self.url} works again")
            self._fails = False
        return True
