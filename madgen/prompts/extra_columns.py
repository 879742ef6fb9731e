"""Convert the values of kept columns to JSON values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any

from madgen.utils.errors import UserError


def json_columns(where: object, columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return the kept columns of a row as JSON values. Raises UserError for values that JSON cannot represent.

    NaN becomes null, dates and times become ISO 8601 strings.
    """
    return {name: _json_value(where, name, value) for name, value in columns.items()}


def _json_value(where: object, name: str, value: Any) -> Any:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return _text(where, name, value)
    if isinstance(value, float | Decimal):
        if math.isinf(value):
            raise UserError(f"{where}: column {name!r} is {value}, which JSON cannot represent; remove the value")
        return None if math.isnan(value) else float(value)
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, list | tuple):
        return [_json_value(where, name, item) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {_text(where, name, key): _json_value(where, name, item) for key, item in value.items()}
    raise UserError(
        f"{where}: column {name!r} holds a {type(value).__name__}, which JSON cannot represent; leave it out of "
        "prompts.keep_columns"
    )


def _text(where: object, name: str, value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{where}: column {name!r} contains half of a surrogate pair, which UTF-8 cannot encode; remove it"
        ) from None
    return value
