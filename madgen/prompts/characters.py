"""Characters that a prompt cannot mean: invisible format characters and the remains of a wrong decoding."""

from __future__ import annotations

import re
import unicodedata

BYTE_ORDER_MARK = "\ufeff"
INVALID = re.compile(
    "[\x00\xad\u180e\u200b\u2060-\u2065\u206a-\u206f\ufeff\ufff9-\ufffb"  # NUL and invisible format characters
    "\ud800-\udfff\ufdd0-\ufdef\ufffd-\uffff]"  # halves of surrogate pairs, noncharacters, replacement character
    # Joiners shape Arabic and Indic letters and combine emoji; after other characters they are invisible.
    "|(?<![\u0590-\u1fff\u2190-\u2bff\ufb50-\ufdff\ufe0f\ufe70-\ufefc\U00010000-\U0001ffff])[\u200c\u200d]"
    # Tags follow a black flag, as in the emoji of Scotland's flag.
    "|(?<![\U0001f3f4\U000e0020-\U000e007f])[\U000e0000-\U000e00ff\U000e01f0-\U000e0fff]"
)
BLANK = re.compile(  # spaces, controls, directions, fillers, and modifiers without a character to modify
    "[\\s\x01-\x1f\x7f-\x9f\u200c-\u200f\u202a-\u202e\u2066-\u2069"
    "\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]*"
)


def is_clean(text: str) -> bool:
    """Return whether a text, such as many prompts joined by spaces, has no invalid character; fast on ASCII."""
    if text.isascii():
        return "\0" not in text
    if text.isprintable() and "\ufffd" not in text:
        return True
    return INVALID.search(text) is None


def is_blank(text: str) -> bool:
    """Return whether a text has no visible character."""
    return BLANK.fullmatch(text) is not None


def invalid_character(text: str) -> str | None:
    """Return what is wrong with the first invalid character and how to fix it; None if there is none."""
    match = INVALID.search(text)
    if match is None:
        return None
    character, place = match[0], f"character {match.start() + 1}"
    if character == "\0":
        return f"contains a NUL character ({place}); if the file is UTF-16, convert it to UTF-8"
    if "\ud800" <= character <= "\udfff":
        return f"contains half of a surrogate pair ({place}), which UTF-8 cannot encode; remove it"
    if character == "\ufffd":
        return f"contains U+FFFD REPLACEMENT CHARACTER ({place}), the trace of a wrong encoding; restore the original"
    name = f"U+{ord(character):04X} {unicodedata.name(character, '(unassigned)')}"
    return f"contains {name} ({place}), which is invisible; remove it"
