"""Convert dataclasses from and to JSON objects; content of another shape raises FormatError."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Callable
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, BinaryIO, Self, Union, get_args, get_origin, get_type_hints

from madgen.utils.errors import UserError

NOT_STORED = {"stored": False}
"""Metadata of fields that are not keys of the JSON object."""
Finite = Annotated[float, "finite"]
"""Type of numbers other than NaN and infinity."""
MAX_INT = 2**64 - 1
"""Largest integer: seeds use the whole range of an unsigned 64-bit integer."""


class FormatError(UserError):
    """A file is not in madgen's format; the message names the file, the key and its value."""


class InvalidValueError(Exception):
    """A value has the wrong type; `path` holds the keys that lead to it."""

    def __init__(self, problem: str, path: str = ""):
        super().__init__(f"{path.lstrip('.') or 'its content'} {problem}")
        self.problem, self.path = problem, path

    def below(self, key: str) -> InvalidValueError:
        """Return the same error with `key` prepended to its path."""
        return InvalidValueError(self.problem, key + self.path)


def to_json(value: Any, indent: int | None = None) -> bytes:
    """Encode a value as UTF-8 JSON with sorted keys: equal values give equal bytes."""
    return (json.dumps(value, sort_keys=True, ensure_ascii=False, indent=indent) + "\n").encode()


def parse_object(data: str | bytes, file: Path | str) -> dict[str, Any]:
    """Parse a JSON object. Raises FormatError."""
    try:
        value = json.loads(data)
        if "\\u" in (data if isinstance(data, str) else data.decode()):
            json.dumps(value, ensure_ascii=False).encode()  # JSON can escape half a character, which UTF-8 cannot hold
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file} is damaged: {error}") from error
    if type(value) is not dict:
        raise FormatError(f"{file} is damaged: its content is {value!r:.60}, expected an object")
    return value


class Record:
    """Convert a dataclass from and to a JSON object; values must have the types of the field annotations."""

    __slots__ = ()

    @classmethod
    def from_json(cls, data: str | bytes, file: Path | str) -> Self:
        """Parse the content of `file`. Raises FormatError."""
        value = parse_object(data, file)
        try:
            return cls.from_dict(value)
        except InvalidValueError as error:
            raise FormatError(f"{file} is damaged: {error}") from None

    @classmethod
    def from_dict(cls, value: Any) -> Self:
        """Convert a JSON object. Raises InvalidValueError."""
        if type(value) is not dict:
            raise InvalidValueError(f"is {value!r:.60}, expected an object")
        values = {}
        for name, parse, required in _schema(cls):  # type: ignore[arg-type]
            try:
                if name in value:
                    values[name] = parse(value[name])
                elif required:
                    raise InvalidValueError("is missing")
            except InvalidValueError as error:
                raise error.below(f".{name}") from None
        if len(values) < len(value) and "extra" in cls.__slots__:
            values["extra"] = {name: value[name] for name in value.keys() - values.keys()}
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON object, without optional fields that are None."""
        result = dict(getattr(self, "extra", {}))
        for item in _stored(type(self)):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            if value is not None or item.default is MISSING:
                result[item.name] = _plain(value)
        return result

    def to_json(self) -> bytes:
        """Return the content of the record's file."""
        return to_json(self.as_dict())


@cache
def _stored(record: Any) -> list[Any]:
    return [item for item in fields(record) if item.metadata != NOT_STORED]


@cache
def _schema(record: Any) -> list[tuple[str, Callable[[Any], Any], bool]]:
    """Return the name and parser of every stored field, and whether it is required."""
    types = get_type_hints(record, include_extras=True)
    return [
        (item.name, _parser(types[item.name]), item.default is MISSING and item.default_factory is MISSING)
        for item in _stored(record)
    ]


def _check(value: Any, valid: bool, expected: str) -> Any:
    if not valid:
        raise InvalidValueError(f"is {value!r:.60}, expected {expected}")
    return value


def _is_number(value: Any) -> bool:
    try:
        return type(value) in (int, float) and float(value) is not None
    except OverflowError:  # an integer above the range of floats
        return False


PLAIN: dict[Any, Callable[[Any], Any]] = {
    str: lambda value: _check(value, type(value) is str, "a string"),
    bool: lambda value: _check(value, type(value) is bool, "true or false"),
    int: lambda value: _check(value, type(value) is int and 0 <= value <= MAX_INT, "an integer >= 0"),
    float: lambda value: _check(value, _is_number(value), "a number"),
    Finite: lambda value: _check(value, _is_number(value) and math.isfinite(value), "a finite number"),
    dict[str, Any]: lambda value: _check(value, type(value) is dict, "an object"),
    list[Any]: lambda value: _check(value, type(value) is list, "a list"),
}


def _parser(kind: Any) -> Callable[[Any], Any]:
    """Return the parser of a plain type, a record, `X | None`, `dict[str, X]` or `tuple[X, ...]`."""
    if kind in PLAIN:
        return PLAIN[kind]
    if isinstance(kind, type) and issubclass(kind, Record):
        return kind.from_dict
    origin = get_origin(kind)
    parse = _parser(get_args(kind)[1 if origin is dict else 0])
    if origin in (Union, UnionType):
        return lambda value: None if value is None else parse(value)

    def parse_all(value: Any) -> Any:
        _check(value, type(value) is (dict if origin is dict else list), "an object" if origin is dict else "a list")
        parsed = {}
        for at, item in value.items() if origin is dict else enumerate(value):
            try:
                parsed[at] = parse(item)
            except InvalidValueError as error:
                raise error.below(f".{at}" if origin is dict else f"[{at}]") from None
        return parsed if origin is dict else tuple(parsed.values())

    return parse_all


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.as_dict()
    return [item.as_dict() for item in value] if isinstance(value, tuple) else value


def open_file(path: Path) -> BinaryIO:
    """Open a regular file for reading. Raises FormatError for a directory, pipe, device or broken link, and OSError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # would wait for the writer of a pipe
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP) and os.path.islink(path):
            raise FormatError(f"{path} is a link that leads to no file") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FormatError(f"{path} is not a regular file")
    return open(descriptor, "rb")


def read_file(path: Path) -> bytes:
    """Read a regular file. Raises FormatError for a directory, pipe or device, and OSError."""
    with open_file(path) as stream:
        return stream.read()
