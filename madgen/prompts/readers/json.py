"""A JSON object `{"0": "prompt", ...}`, as in GPT1k, whose keys are the ids; or an array of prompts or of objects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from madgen.prompts.readers import Chunk, PromptFile, ReadOptions, in_chunks
from madgen.prompts.readers import jsonl as json_lines
from madgen.prompts.readers._columns import split_keys
from madgen.prompts.readers._json import load
from madgen.prompts.readers._lines import read_text
from madgen.utils.errors import UserError

COLUMNS, COMMENTS, GZIP = True, False, True


def read(file: PromptFile, options: ReadOptions) -> Iterator[Chunk]:
    """Read the prompts of a `.json`, which is loaded as a whole; use `.jsonl` for large files."""
    text = read_text(file)
    if _is_json_lines(text):
        yield from json_lines.read(file, options)
        return
    content = load(text, file)
    if isinstance(content, dict):
        items: Iterable[tuple[dict[str, Any], dict[str, Any] | None]]
        items = (_item(key, value, file, options) for key, value in content.items())
    elif isinstance(content, list):
        items = (split_keys(_element(item, number, file), options) for number, item in enumerate(content, 1))
    else:
        raise UserError(
            f'{file} must be a JSON object such as {{"0": "a prompt"}} or an array such as [{{"prompt": "a prompt"}}], '
            f"got {text.strip()[:40]!r}"
        )
    yield from in_chunks(((number, *item) for number, item in enumerate(items, 1)), bool(options.keep))


def _is_json_lines(text: str) -> bool:
    """Return whether a text is one object per line, which some libraries write as `.json`."""
    start = text.lstrip()
    line, _, rest = start.partition("\n")
    return start.startswith("{") and line.rstrip().endswith("}") and rest.lstrip().startswith("{")


def _item(key: str, value: Any, file: PromptFile, options: ReadOptions) -> tuple[dict[str, Any], dict[str, Any] | None]:
    if isinstance(value, dict):
        fields, kept = split_keys(value, options)
        return {**fields, "id": key}, kept
    if options.columns or options.keep:
        setting = "prompts.columns" if options.columns else "prompts.keep_columns"
        raise UserError(f"{setting} does not apply to {file}, which has no columns; leave it empty")
    return {"id": key, "prompt": value}, None


def _element(item: Any, number: int, file: PromptFile) -> dict[str, Any]:
    if isinstance(item, str):
        return {"prompt": item}
    if not isinstance(item, dict):
        raise UserError(f"{file}: item {number} must be a JSON object with the key prompt, got {item!r:.40}")
    return item
