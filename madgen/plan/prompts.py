"""Prompt files to Prompts. To add a format: one reader, which yields (where, dict of fields), and its suffix below."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from madgen.errors import UserError
from madgen.plan.regions import parse_regions
from madgen.types import Prompt

ID_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,96}")
FIELDS = ("id", "prompt", "negative_prompt", "width", "height", "seed", "regions", "across")
MAX_SEED = 2**63 - 1

Line = tuple[str, dict[str, Any]]
"""Where it stands (`file:line`), and its fields."""


def read_prompts(
    source: str,
    *,
    negative_prompt: str,
    height: int,
    width: int,
    limit: int | None = None,
    on_duplicate: str = "error",
    regions: Sequence[Any] = (),
    across: Sequence[Any] = (),
) -> list[Prompt]:
    """The prompts of a file; what a line leaves open takes the given values. UserError names the line at fault."""
    path = Path(source)
    lines = _reader(path)(path)
    prompts: dict[str, Prompt] = {}
    origins: dict[str, str] = {}
    defaults = {"negative_prompt": negative_prompt, "height": height, "width": width, "seed": None}
    parts = {"regions": list(regions), "across": list(across)}
    for where, fields in lines:
        own = {key: value for key, value in fields.items() if value is not None}
        shared = {} if own.keys() & parts.keys() else parts  # a line's own regions replace the job's
        prompt = _prompt(where, {**defaults, **shared, **own}, path.parent)
        if prompt.id in prompts:
            if on_duplicate == "skip":
                continue
            if on_duplicate == "error":
                raise UserError(
                    f"{where}: the same id as {origins[prompt.id]}: {prompt.id!r} ({prompt.text[:40]!r}); "
                    "set prompts.on_duplicate to skip or rename"
                )
            prompt = replace(prompt, id=_free_id(prompt.id, prompts))
        prompts[prompt.id], origins[prompt.id] = prompt, where
        if len(prompts) == limit:
            break
    if not prompts:
        raise UserError(f"prompts.source={source} holds no prompt; write one a line")
    return list(prompts.values())


def prompt_id(text: str) -> str:
    """The id of a prompt that has none: 16 hex digits of its hash."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _free_id(taken: str, prompts: dict[str, Prompt]) -> str:
    number = 2
    while (candidate := f"{taken[:88]}-{number}") in prompts:
        number += 1
    return candidate


def _reader(path: Path) -> Callable[[Path], Iterator[Line]]:
    if not path.exists():
        raise UserError(f"prompts.source={path} does not exist")
    if path.is_dir():
        raise UserError(f"prompts.source={path} is a directory; name a file")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"prompts.source={path} must end in {', '.join(READERS)}, got {path.suffix!r}")
    return reader


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line} is not UTF-8 (byte {error.start}); convert the file to UTF-8") from error
    except OSError as error:
        raise UserError(f"cannot read prompts.source={path}: {error.strerror}") from error


def _read_txt(path: Path) -> Iterator[Line]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", {"prompt": line.strip()}


def _read_jsonl(path: Path) -> Iterator[Line]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        fields = _json(line, where)
        if not isinstance(fields, dict):
            raise UserError(f"{where} must be a JSON object with a prompt, got {line.strip()[:40]!r}")
        yield where, fields


def _read_json(path: Path) -> Iterator[Line]:
    """A JSON object `{"0": "prompt", ...}` as in GPT1k: its keys are the ids."""
    table = _json(_text(path), str(path))
    if not isinstance(table, dict):
        raise UserError(f'{path} must be a JSON object such as {{"0": "a prompt"}}; use .jsonl for one object a line')
    for key, value in table.items():
        yield f"{path}[{key!r}]", {"id": key, "prompt": value}


def _json(text: str, where: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = next((key for key in keys if keys.count(key) > 1), None) if len(set(keys)) < len(keys) else None
        if twice is not None:
            raise UserError(f"{where}: the key {twice!r} is there twice")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON: {error}") from error


READERS: dict[str, Callable[[Path], Iterator[Line]]] = {".txt": _read_txt, ".jsonl": _read_jsonl, ".json": _read_json}


def _prompt(where: str, fields: dict[str, Any], folder: Path) -> Prompt:
    unknown = sorted(set(fields) - set(FIELDS))
    if unknown:
        raise UserError(f"{where}: unknown field {unknown[0]!r}; known: {', '.join(FIELDS)}")
    text, negative = fields.get("prompt"), fields["negative_prompt"]
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: the prompt must be a text that is not empty, got {text!r}")
    if not isinstance(negative, str):
        raise UserError(f"{where}: negative_prompt must be a text, got {negative!r}")
    regions = parse_regions(where, fields, folder)
    for value in (text, negative, *(text for region in regions for text in (region.text, region.negative))):
        if any(0xD800 <= ord(letter) <= 0xDFFF for letter in value):
            raise UserError(f"{where}: a prompt holds half of a surrogate pair, which UTF-8 cannot write")
    identity = fields.get("id", prompt_id(text))
    identity = str(identity) if type(identity) is int else identity
    if not isinstance(identity, str) or not ID_PATTERN.fullmatch(identity):
        raise UserError(
            f"{where}: id must match [A-Za-z0-9_-]{{1,96}} (webdataset keys hold no dots), got {identity!r}"
        )
    for name in ("height", "width"):
        if type(fields[name]) is not int or fields[name] <= 0:
            raise UserError(f"{where}: {name} must be a whole number of pixels > 0, got {fields[name]!r}")
    seed = fields["seed"]
    if seed is not None and (type(seed) is not int or not 0 <= seed <= MAX_SEED):
        raise UserError(f"{where}: seed must be a whole number in 0..{MAX_SEED}, got {seed!r}")
    return Prompt(identity, text, negative, fields["height"], fields["width"], seed, regions)
