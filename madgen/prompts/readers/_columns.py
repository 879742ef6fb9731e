"""Map columns of a table to prompt fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from madgen.config.schema import PROMPT_FIELDS
from madgen.utils.errors import UserError


def choose_columns(name: str, present: Sequence[str], columns: Mapping[str, str]) -> dict[str, str]:
    """Return {column: field} of the columns to read. Raises UserError for a missing, duplicate or unknown column.

    `columns` is `prompts.columns` of the job, {field: column}.
    """
    duplicate = next((column for column in present if list(present).count(column) > 1), None)
    if duplicate is not None:
        raise UserError(f"{name}: duplicate column {duplicate!r}; rename one of them")
    listing = ", ".join(map(repr, present)) or "none"
    if columns:
        missing = next((column for column in columns.values() if column not in present), None)
        if missing is not None:
            raise UserError(f"{name} has no column {missing!r} (prompts.columns); available: {listing}")
        return {column: field for field, column in columns.items()}
    if "prompt" not in present:
        raise UserError(
            f"{name} has no column 'prompt'; available: {listing}; select one with prompts.columns.prompt=..."
        )
    for column in present:
        check_known(name, column)
    return {column: column for column in present}


def check_known(where: object, field: str) -> None:
    """Raise UserError if `field` is not a prompt field."""
    if field not in PROMPT_FIELDS:
        raise UserError(
            f"{where}: unknown field {field!r}; known: {', '.join(PROMPT_FIELDS)}; "
            "select the fields to read with prompts.columns"
        )
