"""The command line's log on stderr, and durations as text."""

from __future__ import annotations

import contextlib
import logging
import sys


class StderrHandler(logging.Handler):
    """Write warnings as `madgen: ...` and other lines as they are. A closed terminal or pipe never stops a run."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "madgen: " if record.levelno >= logging.WARNING else ""
        with contextlib.suppress(OSError, ValueError):
            print(f"{prefix}{record.getMessage()}", file=sys.stderr, flush=True)


def log_to_stderr() -> None:
    """Show madgen's log on stderr from now on. Programs that import madgen configure `logging` themselves."""
    logger = logging.getLogger("madgen")
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        logger.addHandler(StderrHandler())


def say(text: str) -> None:
    """Log a line: a warning if it starts with `madgen: `, else information."""
    level = logging.WARNING if text.startswith("madgen: ") else logging.INFO
    logging.getLogger("madgen").log(level, text.removeprefix("madgen: "))


def eta_text(seconds: float) -> str:
    """Format a duration: `2 h 05 min`, `7 min`, `40 s`."""
    if seconds >= 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
