"""Convert arguments of Python callers to plain values, or raise a UserError that names the argument and its value."""

from __future__ import annotations

import math
import operator
import os
import re
import sys
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from numbers import Complex, Real
from pathlib import Path
from typing import Any

from madgen.utils.errors import UserError

MAX_NAME, MAX_PATH = 255, 3800
"""Limits of file systems, in bytes; PATH_MAX is 4096, minus what madgen appends to a path."""


def whole(name: str, value: Any, minimum: int | None = None) -> int:
    """Convert an integer, also of NumPy or torch."""
    try:
        found = None if _is_bool(value) else operator.index(value)
    except TypeError:
        found = None
    if found is None or (minimum is not None and found < minimum):
        raise UserError(f"{name} must be a whole number{_from(minimum)}, got {value!r}")
    return found


def whole_or_none(name: str, value: Any, minimum: int | None = None) -> int | None:
    """Convert an integer or None."""
    return None if value is None else whole(name, value, minimum)


def number(name: str, value: Any, minimum: float | None = None) -> float:
    """Convert a finite real number."""
    try:
        is_complex = isinstance(value, Complex) and not isinstance(value, Real)
        is_real = hasattr(value, "__float__") and not isinstance(value, str) and not _is_bool(value) and not is_complex
        found = float(value) if is_real else math.nan
    except (OverflowError, TypeError, ValueError):  # too large, or an array
        found = math.nan
    if not math.isfinite(found) or (minimum is not None and found < minimum):
        raise UserError(f"{name} must be a finite number{_from(minimum)}, got {value!r}")
    return found


def _from(minimum: float | None) -> str:
    return "" if minimum is None else f" >= {minimum}"


def _is_bool(value: Any) -> bool:
    """Return whether a value is a boolean, also of NumPy or torch."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")


def switch(name: str, value: Any) -> bool:
    """Convert a boolean; strings are refused, as `"false"` would be true."""
    if not _is_bool(value) or getattr(value, "shape", ()) != ():
        raise UserError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def text(name: str, value: Any) -> str:
    """Convert a string."""
    if not isinstance(value, str):
        raise UserError(f"{name} must be a string, got {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name} must be a string of valid Unicode, got {value!r}") from error
    return str(value)


def text_or_none(name: str, value: Any) -> str | None:
    """Convert a string or None."""
    return None if value is None else text(name, value)


def path(name: str, value: Any) -> str:
    """Convert a path or another name to a string, which need not be valid Unicode."""
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
    """Expand a leading `~`. Raises UserError naming `key` if that home directory is unknown, or for `check_path`."""
    try:
        path = Path(name).expanduser()
    except RuntimeError:
        raise UserError(
            f"{key}={name}: the home directory of {Path(name).parts[0]!r} is unknown; write the whole path"
        ) from None
    check_path(key, str(path))
    return path


def check_path(key: str, name: str) -> None:
    """Raise UserError, naming `key`, if no file can have a path on this machine."""
    if "\0" in name:
        raise UserError(f"{key} contains a NUL character, which no path can contain: {name!r}; remove it")
    try:
        encoded = os.fsencode(name)
    except UnicodeEncodeError:
        encoding = sys.getfilesystemencoding()
        raise UserError(
            f"{key}={name!r} cannot be expressed in this locale's encoding {encoding}; set LC_ALL=C.UTF-8"
        ) from None
    longest = max(map(len, encoded.split(b"/")), default=0)
    if longest > MAX_NAME or len(encoded) > MAX_PATH:
        raise UserError(
            f"{key}={name[:60]}… is too long: {len(encoded)} bytes, its longest name {longest}; "
            f"at most {MAX_PATH} and {MAX_NAME} are possible"
        )


def listed(name: str, value: Any) -> list[Any]:
    """Convert a sequence to a list; strings, mappings and sets are refused."""
    if not isinstance(value, str | bytes | Mapping | Set):
        with suppress(TypeError):  # not iterable, such as an array without dimensions
            return list(value)
    raise UserError(f"{name} must be a list, such as [...], got {value!r}")


def mapping(name: str, value: Any) -> dict[str, Any]:
    """Convert a mapping with strings as keys."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise UserError(f"{name} must be a mapping of names to values, got {value!r}")
    return dict(value)


def texts(name: str, value: Any) -> list[str]:
    """Convert a sequence of strings."""
    return [text(f"each of {name}", one) for one in listed(name, value)]


def nearest(name: str, known: Sequence[str], cutoff: float = 0.5) -> str:
    """Return the end of an error about an unknown name: the most similar known name, or all known names.

    `cutoff`: smallest similarity, 0..1, of a name that is proposed.
    """
    import difflib

    close = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
