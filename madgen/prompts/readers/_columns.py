"""Which columns of a table are which of our fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from madgen.config.schema import PROMPT_FIELDS
from madgen.utils.errors import UserError


def choose_columns(name: str, present: Sequence[str], columns: Mapping[str, str]) -> dict[str, str]:
    """Our field of each column that is to be read; UserError for a column that is missing, doubled or not known.

    `columns`: the job's `prompts.columns`, from our fields to the file's columns.
    """
    twice = next((column for column in present if list(present).count(column) > 1), None)
    if twice is not None:
        raise UserError(f"{name}: the column {twice!r} is there twice")
    listing = ", ".join(map(repr, present)) or "none"
    if columns:
        missing = next((column for column in columns.values() if column not in present), None)
        if missing is not None:
            raise UserError(f"{name} has no column {missing!r} (prompts.columns); its columns are {listing}")
        return {column: ours for ours, column in columns.items()}
    if "prompt" not in present:
        raise UserError(
            f"{name} has no column 'prompt'; its columns are {listing}: say which one with prompts.columns.prompt=..."
        )
    for column in present:
        check_known(name, column)
    return {column: column for column in present}


def check_known(where: object, field: str) -> None:
    """UserError for a field that is none of ours."""
    if field not in PROMPT_FIELDS:
        raise UserError(
            f"{where}: unknown field {field!r}; known: {', '.join(PROMPT_FIELDS)}; "
            "prompts.columns says which fields to read"
        )
