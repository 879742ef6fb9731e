"""Parse JSON and refuse duplicate keys."""

from __future__ import annotations

import json
from typing import Any

from madgen.utils.errors import UserError

# Parses objects as tuples of pairs, which keeps duplicate keys and needs no Python callback.
_DECODER = json.JSONDecoder(object_pairs_hook=tuple)


def flat_pairs(line: str) -> tuple[tuple[str, Any], ...] | None:
    """Parse a stripped line that is one flat object without duplicate keys; return None for anything else.

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
    """Parse JSON. Raises UserError if it is invalid or has duplicate keys."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            keys = [key for key, _ in pairs]
            duplicate = next(key for key in keys if keys.count(key) > 1)
            raise UserError(f"{where}: duplicate key {duplicate!r}; remove one of them")
        return fields

    try:
        return json.loads(text, object_pairs_hook=unique)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON: {error}") from error
