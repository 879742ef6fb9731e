"""Descriptions of a job's keys, from the docstrings of the schema."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from itertools import pairwise
from typing import Any


def field_docstrings(cls: type) -> dict[str, str]:
    """Return the strings that follow the fields of a dataclass and of its bases, by name."""
    documented: dict[str, str] = {}
    for base in filter(dataclasses.is_dataclass, cls.__bases__):
        documented |= field_docstrings(base)
    (definition,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(definition, ast.ClassDef)
    for pair in pairwise(definition.body):
        match pair:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                documented[name] = inspect.cleandoc(text)
    return documented


def summary(config: Any, key: str) -> str:
    """Return the first sentence about a key such as `sampling.width` of a config; empty if it has no such key."""
    *sections, name = key.split(".")
    for section in sections:
        config = getattr(config, section, None)
    text = field_docstrings(type(config)).get(name, "") if dataclasses.is_dataclass(config) else ""
    first = re.split(r"(?<=[^.])[.;]\s", " ".join(text.split()), maxsplit=1)[0]
    return first.removesuffix(".").replace("`", "")
