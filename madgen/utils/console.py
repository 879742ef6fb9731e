"""The command line's streams and its log on stderr, and durations as text."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import logging
import sys

from madgen.utils.credentials import mask


class StderrHandler(logging.Handler):
    """Write warnings as `madgen: ...` and other lines as they are. A closed terminal or pipe never stops a run."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "madgen: " if record.levelno >= logging.WARNING else ""
        with contextlib.suppress(OSError, ValueError):
            print(mask(f"{prefix}{record.getMessage()}"), file=sys.stderr, flush=True)


def escape_unencodable(error: UnicodeError) -> tuple[str | bytes, int]:
    """Encode what a terminal's encoding lacks as in JSON (`\\u6771`), and undecodable bytes of a path as they were."""
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    if all("\udc80" <= letter <= "\udcff" for letter in text):
        return text.encode("ascii", "surrogateescape"), error.end
    return json.dumps(text)[1:-1], error.end


def print_anything() -> None:
    """Let stdout and stderr escape what their encoding lacks, instead of raising UnicodeEncodeError."""
    codecs.register_error("madgen.escape", escape_unencodable)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="madgen.escape")


def log_to_stderr() -> None:
    """Show madgen's log on stderr from now on. Programs that import madgen configure `logging` themselves."""
    logger = logging.getLogger("madgen")
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        logger.addHandler(StderrHandler())


def eta_text(seconds: float) -> str:
    """Format a duration: `2 h 05 min`, `7 min`, `40 s`."""
    if seconds >= 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
