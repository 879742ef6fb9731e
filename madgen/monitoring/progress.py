"""Show the progress of the whole dataset: a bar on a terminal, lines in a log file."""

from __future__ import annotations

import logging
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from madgen.dataset.format import Manifest
from madgen.dataset.layout import DatasetDir
from madgen.dataset.shards.leases import Worker
from madgen.monitoring.observer import Observer
from madgen.monitoring.status import Status, settled
from madgen.monitoring.status_page import progress_text
from madgen.types import Record

logger = logging.getLogger(__name__)
LOG_EVERY_S = 30.0
DRAW_EVERY_S = 0.25


class ProgressReport(Observer):
    """Show the samples of all workers, in finished and in open shards."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.bar: Progress | None = None
        self.due = 0.0

    def started(self, directory: DatasetDir, worker: Worker, manifest: Manifest) -> None:
        self.status = Status(directory)
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self.bar = Progress(*columns, TextColumn("{task.fields[rate]}"), console=self.console)
            self.task: TaskID = self.bar.add_task(manifest.name, total=manifest.plan.samples, rate="")
            self.bar.start()
        self._show()

    def sample_written(self, record: Record) -> None:
        if time.monotonic() >= self.due:
            self._show()

    def _show(self) -> None:
        began = time.monotonic()
        state = self.status.read()
        text = progress_text(state) or "starting"
        duration = time.monotonic() - began  # grows with the number of workers; use at most 1 % of the time
        self.due = began + max(DRAW_EVERY_S if self.bar is not None else LOG_EVERY_S, 100 * duration)
        if self.bar is not None:
            self.bar.update(self.task, completed=settled(state), rate=text)
        else:
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            logger.info("%s %d/%d panoramas, %s", now, settled(state), state["planned"], text)

    def stopped(self) -> None:
        if self.bar is not None:
            self._show()
            self.bar.stop()
            self.bar = None
