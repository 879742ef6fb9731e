"""Arguments from Python: each as the plain value that it stands for, or UserError that names it and what it is."""

from __future__ import annotations

import math
import operator
import os
import re
from collections.abc import Mapping, Set
from contextlib import suppress
from numbers import Complex, Real
from pathlib import Path
from typing import Any

from madgen.utils.errors import UserError


def whole(name: str, value: Any, least: int | None = None) -> int:
    """A whole number, of Python or of another library."""
    try:
        found = None if _is_bool(value) else operator.index(value)
    except TypeError:
        found = None
    if found is None or (least is not None and found < least):
        raise UserError(f"{name} must be a whole number{_from(least)}, got {value!r}")
    return found


def whole_or_none(name: str, value: Any, least: int | None = None) -> int | None:
    """As `whole`, or nothing."""
    return None if value is None else whole(name, value, least)


def number(name: str, value: Any, least: float | None = None) -> float:
    """A finite real number."""
    try:
        is_one = hasattr(value, "__float__") and not isinstance(value, str) and not _is_bool(value)
        found = float(value) if is_one and not _is_complex(value) else math.nan
    except (OverflowError, TypeError, ValueError):  # too large, or an array
        found = math.nan
    if not math.isfinite(found) or (least is not None and found < least):
        raise UserError(f"{name} must be a finite number{_from(least)}, got {value!r}")
    return found


def _from(least: float | None) -> str:
    return "" if least is None else f" >= {least}"


def _is_bool(value: Any) -> bool:
    """Also of another library."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")


def _is_complex(value: Any) -> bool:
    return isinstance(value, Complex) and not isinstance(value, Real)


def switch(name: str, value: Any) -> bool:
    """True or False, of Python or of another library; `"false"` would be true."""
    if not _is_bool(value) or getattr(value, "shape", ()) != ():
        raise UserError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def text(name: str, value: Any) -> str:
    """One text."""
    if not isinstance(value, str):
        raise UserError(f"{name} must be a text, got {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name} must be a text of Unicode, got {value!r}") from error
    return str(value)


def text_or_none(name: str, value: Any) -> str | None:
    """As `text`, or nothing."""
    return None if value is None else text(name, value)


def path(name: str, value: Any) -> str:
    """A file, a folder, or what else a text can name; the names of files need not be Unicode."""
    found = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(found, str):
        raise UserError(f"{name} must be a path, got {value!r}")
    return found


def environment_number(variables: Mapping[str, str], name: str, default: int | None = None) -> int:
    """Return an environment variable that must be a whole number >= 0; an empty one counts as missing."""
    value = variables.get(name) or default
    if value is None:
        raise UserError(f"the environment variable {name} is missing; start madgen with torchrun, or unset the others")
    if not re.fullmatch(r"[0-9]{1,9}", str(value)):
        raise UserError(f"the environment variable {name} must be a whole number >= 0, got {value!r}; unset it")
    return int(value)


def expand_user(name: str | os.PathLike[str], key: str = "a path") -> Path:
    """Expand a leading `~`; UserError naming `key` if that home directory is unknown."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise UserError(
            f"{key}={name}: the home directory of {Path(name).parts[0]!r} is unknown; write the whole path"
        ) from None


def listed(name: str, value: Any) -> list[Any]:
    """What has an order; neither one text nor a table."""
    if not isinstance(value, str | bytes | Mapping | Set):
        with suppress(TypeError):  # no list, or an array without dimensions
            return list(value)
    raise UserError(f"{name} must be a list, such as [...], got {value!r}")


def texts(name: str, value: Any) -> list[str]:
    """A list of texts."""
    return [text(f"each of {name}", one) for one in listed(name, value)]
