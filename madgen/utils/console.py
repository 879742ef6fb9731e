"""Lines for people, on stderr. Nobody may be there to read them: that never stops a run."""

from __future__ import annotations

import contextlib
import sys


def say(text: str) -> None:
    """Prints a line; a terminal that is gone, or a closed pipe, is no reason to fail."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def eta_text(seconds: float) -> str:
    """`2 h 05 min`, `7 min`, `40 s`."""
    if seconds >= 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
