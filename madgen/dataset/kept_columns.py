"""Kept columns of a dataset (`prompts.keep_columns`, attributes of a template) as typed columns of its index."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import pyarrow as pa

from madgen.config.schema import SCORES
from madgen.dataset.format import COLUMNS, Manifest, SampleEntry
from madgen.dataset.layout import DatasetDir

PREFIX = "column_"
"""Start of the names of columns whose own name is taken."""
WHOLE = re.compile(r"0|-?[1-9][0-9]{0,18}")


@dataclass(frozen=True)
class KeptColumns:
    """The kept columns of a dataset.

    A column is numeric if all values are numbers, or texts that are written as numbers are: `7` and `0.5`, but not
    `007`. Columns of lists, objects or values of several types are texts, in JSON.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    """Names in prompt files by names in the index, which differ if the index has another column of that name."""
    types: Mapping[str, pa.DataType] = field(default_factory=dict)
    """Types by names in the index."""

    @classmethod
    def of(cls, directory: DatasetDir, manifest: Manifest) -> Self:
        """Read the kept columns from the sidecars; none, without reading all of them, if the job keeps none."""
        prompts = [source.job.get("prompts") or {} for source in manifest.sources or (manifest,)]
        if not any(item.get("keep_columns") or item.get("template") for item in prompts):
            return cls()
        return cls.infer(entry.columns or {} for entry in directory.entries())

    @classmethod
    def infer(cls, rows: Iterable[Mapping[str, Any]]) -> Self:
        """Infer the types of all columns of some samples."""
        kinds: dict[str, set[str]] = {}
        for row in rows:
            for name, value in row.items():
                kinds.setdefault(name, set()).add(_kind(value))
        taken = {*COLUMNS, *SCORES}
        names = {}
        for name in sorted(kinds):
            shown = name
            while shown in taken or (shown != name and shown in kinds):
                shown = PREFIX + shown
            taken.add(shown)
            names[shown] = name
        return cls(names, {shown: _type(kinds[name] - {"null"}) for shown, name in names.items()})

    @cached_property
    def texts(self) -> frozenset[str]:
        """Return the columns that are not numeric."""
        return frozenset(name for name, kind in self.types.items() if kind == pa.string())

    def values(self, entry: SampleEntry) -> dict[str, Any]:
        """Return the values of a sample, converted to the types of the columns."""
        columns = entry.columns or {}
        return {name: _convert(columns.get(self.names[name]), kind) for name, kind in self.types.items()}


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if -(2**63) <= value < 2**63 else "uint" if 0 <= value < 2**64 else "json"
    if isinstance(value, float):
        return "float"
    if isinstance(value, str):
        number = _number(value)
        return "text" if number is None else f"text {type(number).__name__}"
    return "json"


def _number(text: str) -> int | float | None:
    """Return the number that a text is the usual notation of; None for other texts, such as `007` and `1e3`."""
    if WHOLE.fullmatch(text) and -(2**63) <= int(text) < 2**63:
        return int(text)
    try:
        number = float(text)
    except ValueError:
        return None
    return number if repr(number) == text and number - number == 0 else None


def _type(kinds: set[str]) -> pa.DataType:
    if kinds == {"bool"}:
        return pa.bool_()
    if kinds in ({"int"}, {"text int"}):
        return pa.int64()
    if kinds and kinds <= {"int", "uint"}:
        return pa.uint64()
    if kinds and (kinds <= {"int", "uint", "float"} or kinds <= {"text int", "text float"}):
        return pa.float64()
    return pa.string()


def _convert(value: Any, kind: pa.DataType) -> Any:
    if value is None:
        return None
    if kind == pa.string():
        return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)
    if kind == pa.float64():
        return float(value)
    return _number(value) if isinstance(value, str) else value
