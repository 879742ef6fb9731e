"""Escape untrusted text for Markdown."""

from __future__ import annotations

import re


def escaped(text: str, max_length: int = 200) -> str:
    """Return text as one line of plain Markdown, truncated to `max_length` characters before escaping."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    line = line if len(line) <= max_length else f"{line[: max_length - 1]}…"
    line = re.sub(r"([\\`*_{}\[\]()<>#!|&~$:@])", r"\\\1", line)
    return re.sub(r"(www)\.", r"\1\\.", line, flags=re.IGNORECASE)  # or GitHub turns it into a link
