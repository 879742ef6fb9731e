"""Progress over the whole dataset: a bar on a terminal, plain lines in a log file."""

from __future__ import annotations

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
from madgen.utils.console import say

LOG_EVERY_S = 30.0
DRAW_EVERY_S = 0.25


class ProgressReport(Observer):
    """Shows samples made by all workers: those in finished shards plus those in everybody's open ones."""

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
        looked = time.monotonic() - began  # long where there are many workers: no more than a hundredth of the time
        self.due = began + max(DRAW_EVERY_S if self.bar is not None else LOG_EVERY_S, 100 * looked)
        if self.bar is not None:
            self.bar.update(self.task, completed=settled(state), rate=text)
        else:
            say(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {settled(state)}/{state['planned']} panoramas, {text}")

    def stopped(self) -> None:
        if self.bar is not None:
            self._show()
            self.bar.stop()
            self.bar = None
