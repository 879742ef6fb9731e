"""Check the types of a job that Python code builds; OmegaConf checks those of job files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from madgen.utils.errors import UserError
from madgen.utils.validation import nearest

NAMES = {str: "a string", int: "a whole number", float: "a number", bool: "True or False", NoneType: "None"}


_hints = cache(get_type_hints)


def check_fields(config: Any, prefix: str = "") -> None:
    """Convert mappings in the fields of a frozen dataclass to their dataclasses, and check the types of all values.

    Raises UserError with the name of the field, the value and what it must be.
    """
    for item in fields(config):
        value, hint = getattr(config, item.name), _hints(type(config))[item.name]  # type: ignore[arg-type]
        converted = _converted(value, hint, f"{prefix}{item.name}")
        if converted is not value:
            object.__setattr__(config, item.name, converted)


def _converted(value: Any, hint: Any, name: str) -> Any:
    if is_dataclass(hint):
        return _section(value, hint, name)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (list, tuple):
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise UserError(f"{name} must be a list, got {value!r}")
        items = [_converted(item, arguments[0], f"an item of {name}") for item in value]
        unchanged = all(new is old for new, old in zip(items, value, strict=True))
        return value if unchanged else type(value)(items)  # type: ignore[call-arg]
    allowed = arguments if origin in (Union, UnionType) else (hint,)
    if not all(each in NAMES for each in allowed) or any(_is_instance(value, each) for each in allowed):
        return value
    raise UserError(f"{name} must be {' or '.join(NAMES[each] for each in allowed)}, got {value!r}")


def _section(value: Any, cls: Any, name: str) -> Any:
    if isinstance(value, cls):
        check_fields(value, f"{name}.")
        return value
    if not isinstance(value, Mapping):
        raise UserError(f"{name} must be a {cls.__name__} or a mapping of its keys, got {value!r}")
    hints = _hints(cls)
    for key in value:
        if key not in hints:
            raise UserError(f"unknown key '{name}.{key}'{nearest(str(key), list(hints))}")
    return cls(**{key: _converted(item, hints[key], f"{name}.{key}") for key, item in value.items()})


def _is_instance(value: Any, kind: Any) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)
