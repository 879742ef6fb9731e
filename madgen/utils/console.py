"""The command line's streams and its log on stderr, and durations as text."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import logging
import os
import re
import sys
from collections.abc import Iterator

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


def ignore_invalid_size() -> None:
    """Remove a size of the terminal from the environment that rich cannot read, such as `COLUMNS=²`."""
    for name in ("COLUMNS", "LINES"):
        if not re.fullmatch("[0-9]{1,9}", os.environ.get(name, "0"), re.ASCII):
            del os.environ[name]


@contextlib.contextmanager
def ignoring_closed_pipe() -> Iterator[None]:
    """Leave the block, without an error, if the reader of stdout has ended, such as `head`; keep its SystemExit."""
    try:
        try:
            yield
        finally:
            if sys.stdout is not None and not sys.stdout.closed:
                sys.stdout.flush()
    except (BrokenPipeError, SystemExit) as error:
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            raise
        with open(os.devnull, "wb") as nowhere:  # or the interpreter would flush in vain when it exits
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        if isinstance(error.__context__, SystemExit):
            raise error.__context__ from None


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


def plural(count: int, noun: str) -> str:
    """Format a number of things: `1 shard`, `2 shards`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def rate_text(per_second: float) -> str:
    """Format a number of panoramas per second, minute or hour, the first unit of which has at least one."""
    for unit, seconds in (("s", 1), ("min", 60)):
        if per_second * seconds >= 0.995:
            return f"{per_second * seconds:.2f} panoramas/{unit}"
    return f"{per_second * 3600:.1f} panoramas/h"


def size_text(size: float) -> str:
    """Format a number of bytes in decimal units: `999 bytes`, `2.4 MB`, `1.2 TB`."""
    if size < 1000:
        return plural(round(size), "byte")
    units = ["PB", "TB", "GB", "MB", "kB"]
    unit, size = units.pop(), size / 1000
    while size >= 999.5 and units:
        unit, size = units.pop(), size / 1000
    return f"{size:.1f} {unit}" if size < 100 else f"{size:.0f} {unit}"
