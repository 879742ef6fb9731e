"""Lines for people, on stderr. Nobody may be there to read them: that never stops a run."""

from __future__ import annotations

import contextlib
import sys


def say(text: str) -> None:
    """Prints a line; a terminal that is gone, or a closed pipe, is no reason to fail."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)
