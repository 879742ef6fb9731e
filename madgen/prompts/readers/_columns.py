"""Choose the columns of a table, or the keys of JSON objects, that a job reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from madgen.prompts.picture_columns import check_known
from madgen.prompts.readers import ALL, ReadOptions
from madgen.utils.errors import UserError


@dataclass(frozen=True)
class Choice:
    """Columns to read."""

    fields: Mapping[str, str]
    """Field by column."""
    extras: Sequence[str]
    """Columns to keep as they are."""

    @property
    def columns(self) -> list[str]:
        """Return the names of all columns to read."""
        return list(dict.fromkeys((*self.fields, *self.extras)))


def choose_columns(name: str, present: Sequence[str], options: ReadOptions) -> Choice:
    """Choose among the columns of a table. Raises UserError for a missing, duplicate or unknown column."""
    duplicate = next((column for column in present if list(present).count(column) > 1), None)
    if duplicate is not None:
        raise UserError(f"{name}: duplicate column {duplicate!r}; rename one of them")
    listing = ", ".join(map(repr, present)) or "none"
    if options.columns:
        _require(name, options.columns.values(), present, "prompts.columns", listing)
        fields = {column: field for field, column in options.columns.items()}
    elif "prompt" not in present:
        raise UserError(
            f"{name} has no column 'prompt'; available: {listing}; select one with prompts.columns.prompt=..."
        )
    else:
        fields = {column: column for column in present if column in options.fields}
    others = [column for column in present if column not in fields]
    if options.keep == ALL:
        return Choice(fields, others)
    _require(name, options.keep, present, "prompts.keep_columns", listing)
    if others and not options.keep and not options.columns:
        check_known(name, others[0], options.fields)
    return Choice(fields, options.keep)


def _require(name: str, wanted: Any, present: Sequence[str], setting: str, listing: str) -> None:
    missing = next((column for column in wanted if column not in present), None)
    if missing is not None:
        raise UserError(f"{name} has no column {missing!r} ({setting}); available: {listing}")


def split_keys(row: Mapping[str, Any], options: ReadOptions) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the fields of a JSON object and its kept keys, None if none are kept.

    Unknown keys remain among the fields, where the parser refuses them, unless they are kept or ignored.
    """
    columns, keep = options.columns, options.keep
    if columns:
        fields = {field: row.get(column) for field, column in columns.items()}
        known: Any = columns.values()
    else:
        fields = {key: value for key, value in row.items() if not keep or key in options.fields}
        known = options.fields
    if not keep:
        return fields, None
    if keep == ALL:
        return fields, {key: value for key, value in row.items() if key not in known}
    return fields, {key: row[key] for key in keep if key in row}
