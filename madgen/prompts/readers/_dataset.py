"""Samples of a WebDataset as prompts, with their pictures: `dataset://folder`, or a single tar file."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from madgen.prompts.picture_files import TarMember
from madgen.prompts.readers import ALL, Chunk, ReadOptions
from madgen.utils.errors import UserError
from madgen.utils.validation import expand_user

SCHEME = "dataset://"
IMAGES = ("png", "jpg", "jpeg", "webp")
MEMBER = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
"""Key and suffix of a member, as in webdataset."""
ROWS = 1024
MAX_TEXT = 1 << 26
"""Size of the largest text or JSON that is read, in bytes."""


def is_dataset(source: str) -> bool:
    """Return whether a source is a WebDataset."""
    return source.startswith(SCHEME)


def dataset_tars(source: str) -> list[Path]:
    """Return the tar files of a WebDataset, of one made by madgen the finished ones. Raises UserError if none."""
    folder = expand_user(source.removeprefix(SCHEME), "prompts.source")
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise UserError(f"prompts.source={source}: the folder {folder} does not exist")
    tars = sorted(path for path in folder.rglob("*.tar") if path.is_file())
    if (folder / "dataset.json").is_file():
        tars = [path for path in tars if path.parent == folder / "shards" and path.with_suffix(".json").is_file()]
    if not tars:
        raise UserError(f"prompts.source={source} has no finished tar file; generate the dataset first")
    return tars


def read_dataset(source: str, options: ReadOptions) -> Iterator[Chunk]:
    """Read the samples in order. Raises UserError for a damaged tar file, or a sample without a prompt."""
    numbers: list[int] = []
    rows: list[str | dict[str, Any]] = []
    extras: list[dict[str, Any]] = []

    def chunk() -> Chunk:
        return Chunk(list(numbers), list(rows), list(extras) if options.keep else None)

    number = 0
    for tar in dataset_tars(source):
        try:
            for key, members in _samples(tar):
                number += 1
                row, kept = _row(f"{source}:{number}: sample {key} in {tar}", key, members, options)
                numbers.append(number)
                rows.append(row)
                extras.append(kept)
                if len(rows) == ROWS:
                    yield chunk()
                    for column in (numbers, rows, extras):
                        column.clear()
        except (tarfile.TarError, OSError, EOFError) as error:
            yield chunk()
            raise UserError(f"prompts.source={source}: cannot read {tar}: {error}") from error
        except UserError:
            yield chunk()  # rows before the invalid one
            raise
    yield chunk()


def _samples(path: Path) -> Iterator[tuple[str, dict[str, TarMember | bytes]]]:
    """Yield the key and the members of each sample by suffix: the content of texts, and where pictures are."""
    with tarfile.open(path, "r:") as tar:
        named = ((match, member) for member in tar if member.isfile() and (match := MEMBER.fullmatch(member.name)))
        for key, group in groupby(((match[1], match[2].lower(), member) for match, member in named), itemgetter(0)):
            members: dict[str, TarMember | bytes] = {}
            for _, suffix, member in group:
                if suffix in IMAGES:
                    members[suffix] = TarMember(str(path.resolve()), member.offset_data, member.size)
                elif suffix in ("txt", "json") and member.size <= MAX_TEXT:
                    content = tar.extractfile(member)
                    members[suffix] = b"" if content is None else content.read()
            yield key, members


def _row(
    where: str, key: str, members: Mapping[str, TarMember | bytes], options: ReadOptions
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of a sample, and its kept columns."""
    content = _object(where, members.get("json", b"{}"))
    names = options.columns or {name: name for name in ("prompt", "negative_prompt", "seed")}
    row = {field: content.get(column) for field, column in names.items()}
    if not isinstance(row.get("prompt"), str) and "prompt" not in options.columns and "txt" in members:
        row["prompt"] = _text(where, members["txt"]).strip()
    if not isinstance(row.get("prompt"), str):
        raise UserError(f"{where} has no prompt, in .txt or as {names.get('prompt', 'prompt')!r} in .json")
    row.setdefault("id", _id(key, content))
    if "image" in options.fields:
        row["image"] = next((members[suffix] for suffix in IMAGES if suffix in members), None)
    columns = content.get("columns")
    kept = dict(columns) if isinstance(columns, dict) else {}
    if options.keep != ALL:
        kept = {name: {**content, **kept}[name] for name in options.keep if name in content or name in kept}
    return row, kept


def _id(key: str, content: Mapping[str, Any]) -> str:
    """Return the id of a prompt: that of the first sample of a madgen dataset, or else the sample's key."""
    identity = content.get("prompt_id") if content.get("sample_index") == 0 else None
    return re.sub(r"[^A-Za-z0-9_-]", "_", identity if isinstance(identity, str) else key)[-96:]


def _object(where: str, content: TarMember | bytes) -> dict[str, Any]:
    try:
        value = json.loads(_text(where, content))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: its JSON is damaged: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: its JSON is not an object")
    return value


def _text(where: str, content: TarMember | bytes) -> str:
    assert isinstance(content, bytes)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: its text is not UTF-8: {error}") from error
