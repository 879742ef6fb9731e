"""Upload shards in a background thread. Failures and slow uploads never block sampling."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable

from madgen.dataset.layout import DatasetDir
from madgen.dataset.remote.filesystem import describe_error
from madgen.dataset.remote.push import Push, UnsentError, open_remote
from madgen.utils.errors import UserError

logger = logging.getLogger(__name__)

PAUSE_S = 30.0
"""Pause after a failed shard, which is then retried after the others."""
TELL_EVERY_S = 30.0


class BackgroundUpload:
    """Upload the shards that this process publishes, in order. Shards that remain are left to `push`."""

    def __init__(self, directory: DatasetDir, url: str):
        self.directory, self.url = directory, url
        self._queue: queue.Queue[str | None] = queue.Queue()
        self._stopping, self._finishing = threading.Event(), threading.Event()
        self._fails = False

    def start(self, sweep: bool = False) -> None:
        """Start uploading; with `sweep`, include finished shards that earlier processes did not upload."""
        self._thread = threading.Thread(target=self._work, args=(sweep,), name="upload", daemon=True)
        self._thread.start()

    def add(self, shard: str) -> None:
        """Enqueue a published shard."""
        self._queue.put(shard)

    def finish(self, stopped: Callable[[], bool]) -> None:
        """Wait until every shard is uploaded or has failed once more, or `stopped` returns True; log the progress."""
        self._finishing.set()
        self._queue.put(None)
        due = time.monotonic() + 1
        while self._thread.is_alive() and not stopped():
            self._thread.join(0.2)
            if time.monotonic() >= due and (left := self._queue.qsize()):
                logger.info(f"uploading to {self.url}: {left} {'shards' if left > 1 else 'shard'} to go")
                due = time.monotonic() + TELL_EVERY_S
        self._stopping.set()  # without waiting for the current upload
        self._queue.put(None)

    def _work(self, sweep: bool) -> None:
        try:
            sender = Push(self.directory, open_remote("output.upload", self.url), self._stopping)
        except UserError as error:
            logger.warning(str(error))
            return
        with contextlib.suppress(UnsentError, OSError):
            if sweep:
                listing = sender.listing()
                for name in sorted(self.directory.done()):
                    if not {f"shards/{name}.tar", f"shards/{name}.json"} <= listing.keys():
                        self._queue.put(name)
        while (shard := self._queue.get()) is not None and not self._stopping.is_set():
            if not self._send(sender, shard) and not self._finishing.wait(PAUSE_S):
                self._queue.put(shard)

    def _send(self, sender: Push, shard: str) -> bool:
        """Upload a shard; return False if it must be retried."""
        if not self.directory.is_done(shard):  # reopened in the meantime
            return True
        try:
            sender.shard(shard)
        except Exception as error:  # an upload must never stop the run
            reason = str(error) if isinstance(error, UnsentError) else describe_error(error)
            if not self._fails and not sender.stopping.is_set():
                logger.warning(f"cannot upload to {self.url}: {reason}; sampling goes on, and it is tried again")
            self._fails = True
            return False
        if self._fails:
            logger.warning(f"uploading to {self.url} works again")
            self._fails = False
        return True
