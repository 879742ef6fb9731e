"""Progress of commands: a bar on a terminal, in a log file a line every 30 s."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

logger = logging.getLogger(__name__)
LOG_EVERY_S = 30.0


class Report(Protocol):
    """Show the number of items done and in total, and a detail such as the amount of data."""

    def __call__(self, done: int, total: int, detail: str = "") -> None: ...


@contextmanager
def showing_progress(activity: str, unit: str, first_line_s: float | None = None) -> Iterator[Report]:
    """Yield a function that shows progress on stderr, such as `verifying out/demo: 12 of 80 shards`.

    `first_line_s`: seconds after which the first line is logged where stderr is not a terminal; None: `LOG_EVERY_S`.
    """
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn(unit)
    console = Console(stderr=True, highlight=False)
    due = time.monotonic() + (LOG_EVERY_S if first_line_s is None else first_line_s)
    with Progress(
        *columns, TextColumn("{task.fields[detail]}", markup=False), TimeElapsedColumn(),
        console=console, transient=True, disable=not sys.stderr.isatty(),
    ) as bar:  # fmt: skip
        task = bar.add_task(activity, total=None, detail="")

        def report(done: int, total: int, detail: str = "") -> None:
            nonlocal due
            bar.update(task, completed=done, total=total, detail=detail)
            if bar.disable and time.monotonic() >= due:
                logger.info(f"{activity}: {done} of {total} {unit}{', ' if detail else ''}{detail}")
                due = time.monotonic() + LOG_EVERY_S

        yield report
