"""JSON in which no key is there twice."""

from __future__ import annotations

import json
from typing import Any

from madgen.utils.errors import UserError

# Objects become tuples of pairs, which a doubled key survives, without a call back into Python.
_DECODER = json.JSONDecoder(object_pairs_hook=tuple)


def flat_pairs(line: str) -> tuple[tuple[str, Any], ...] | None:
    """The pairs of a stripped line with one flat object and no doubled key; None: `load` knows more, or what is wrong.

    Several times faster than `load`.
    """
    try:
        pairs, end = _DECODER.scan_once(line, 0)  # type: ignore[attr-defined]
    except (ValueError, RecursionError, StopIteration):
        return None
    if end != len(line) or type(pairs) is not tuple:
        return None
    if len(pairs) > 1 and len(dict(pairs)) < len(pairs):
        return None
    for _, value in pairs:
        if type(value) is tuple or type(value) is list:
            return None
    return pairs


def load(text: str, where: object) -> Any:
    """Parsed JSON; UserError if it is none, or if a key is there twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise UserError(f"{where}: the key {twice!r} is there twice")
        return found

    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON: {error}") from error
