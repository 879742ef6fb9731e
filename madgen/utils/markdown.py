"""Texts that others wrote, in the Markdown that madgen writes."""

from __future__ import annotations

import re


def escaped(text: str, most: int = 200) -> str:
    """Any text as plain text in one line, no longer than `most` characters before it is escaped."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    line = line if len(line) <= most else f"{line[: most - 1]}…"
    line = re.sub(r"([\\`*_{}\[\]()<>#!|&~$:@])", r"\\\1", line)
    return re.sub(r"(www)\.", r"\1\\.", line, flags=re.IGNORECASE)  # GitHub would make a link of it
