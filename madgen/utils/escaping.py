"""Escape untrusted text for Markdown and HTML pages."""

from __future__ import annotations

import json
import re
from typing import Any


def escaped(text: str, max_length: int = 200) -> str:
    """Return text as one line of plain Markdown, truncated to `max_length` characters before escaping."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    line = line if len(line) <= max_length else f"{line[: max_length - 1]}…"
    line = re.sub(r"([\\`*_{}\[\]()<>#!|&~$:@])", r"\\\1", line)
    return re.sub(r"(www)\.", r"\1\\.", line, flags=re.IGNORECASE)  # or GitHub turns it into a link


def json_block(name: str, value: Any) -> bytes:
    """Return a JSON data block in ASCII without characters of markup, so that no text of a dataset acts as HTML."""
    text = json.dumps(value, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f'<script type="application/json" id="{name}">{text}</script>\n'.encode("ascii")
