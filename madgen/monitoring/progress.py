"""Show the progress of the whole dataset: a bar on a terminal, lines in a log file."""

from __future__ import annotations

import logging
import sys
import threading
import time
from typing import Any

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
        self.lock = threading.Lock()  # steps are reported by another thread than samples
        self.state: dict[str, Any] = {}
        self.due = self.step_due = 0.0
        self.sampling_first_batch = True

    def started(self, directory: DatasetDir, worker: Worker, manifest: Manifest) -> None:
        self.status = Status(directory)
        # Console.is_terminal is also true for a log file if FORCE_COLOR is set, as in notebooks
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self.bar = Progress(*columns, TextColumn("{task.fields[rate]}"), console=self.console)
            self.task: TaskID = self.bar.add_task(manifest.name, total=manifest.plan.samples, rate="")
            self.bar.start()
        self._show("starting")

    def step_done(self, step: int, steps: int) -> None:
        if self.sampling_first_batch and time.monotonic() >= self.step_due:
            self.step_due = time.monotonic() + self.interval_s
            with self.lock:
                self._write(self.state, f"sampling the first batch, step {step} of {steps}")

    def sample_written(self, record: Record) -> None:
        self.sampling_first_batch = False
        if time.monotonic() >= self.due:
            self._show()

    @property
    def interval_s(self) -> float:
        """Return the shortest time between two reports."""
        return LOG_EVERY_S if self.bar is None else DRAW_EVERY_S

    def _show(self, activity: str = "sampling") -> None:
        with self.lock:
            began = time.monotonic()
            self.state = self.status.read()
            duration = time.monotonic() - began  # grows with the number of workers; use at most 1 % of the time
            self.due = began + max(self.interval_s, 100 * duration)
            self.step_due = began + self.interval_s
            self._write(self.state, activity)

    def _write(self, state: dict[str, Any], activity: str) -> None:
        """Show the throughput, or what this process does as long as there is none."""
        text = progress_text(state) or activity
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
