"""Embed untrusted data in HTML pages."""

from __future__ import annotations

import json
from typing import Any


def json_block(name: str, value: Any) -> bytes:
    """Return a JSON data block in ASCII without characters of markup, so that no text of a dataset acts as HTML."""
    text = json.dumps(value, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f'<script type="application/json" id="{name}">{text}</script>\n'.encode("ascii")
