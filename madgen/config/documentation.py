"""Descriptions of a job's keys, from the docstrings of the schema."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from typing import Any


def field_docstrings(cls: type) -> dict[str, str]:
    """Return the strings that follow the fields of a dataclass and of its bases, by name."""
    inherited = [field_docstrings(base) for base in cls.__bases__ if dataclasses.is_dataclass(base)]
    (definition,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(definition, ast.ClassDef)
    documented = {name: text for fields in inherited for name, text in fields.items()}
    for field, following in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            match following:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    documented[field.target.id] = inspect.cleandoc(text)
    return documented


def summary(config: Any, key: str) -> str:
    """Return the first sentence about a key such as `sampling.width` of a config; empty if it has no such key."""
    *sections, name = key.split(".")
    for section in sections:
        config = getattr(config, section, None)
    text = field_docstrings(type(config)).get(name, "") if dataclasses.is_dataclass(config) else ""
    first = re.split(r"(?<=[^.])[.;]\s", " ".join(text.split()), maxsplit=1)[0]
    return first.removesuffix(".").replace("`", "")
