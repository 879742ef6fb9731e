"""Samples of a WebDataset as prompts, with their pictures: `dataset://folder`, or a single tar file."""

from __future__ import annotations

import glob
import json
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

from madgen.images.picture_cache import MAX_BYTES
from madgen.prompts.picture_files import TarMember
from madgen.prompts.readers import ALL, Chunk, ReadOptions, Row, in_chunks
from madgen.prompts.regions import RecordedRegions
from madgen.utils.errors import UserError
from madgen.utils.validation import expand_user

SCHEME = "dataset://"
IMAGES = ("png", "jpg", "jpeg", "webp")
SUFFIXES = (".tar", ".tar.gz", ".tgz")
PICTURES = ("image", "mask", "control", "style")
"""Columns that name pictures."""
MEMBER = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
"""Key and suffix of a member, as in webdataset."""
ROWS, ROWS_COMPRESSED = 1024, 16
"""Samples in memory: those of compressed tar files with their pictures."""
MAX_FILES = 1_000_000
MAX_TEXT = 1 << 26
"""Size of the largest text or JSON that is read, in bytes."""
MAX_SIZES = {**dict.fromkeys(IMAGES, MAX_BYTES), "txt": MAX_TEXT, "json": MAX_TEXT}


def is_dataset(source: str) -> bool:
    """Return whether a source is a WebDataset."""
    return source.startswith(SCHEME)


def dataset_tars(source: str) -> list[Path]:
    """Return the tar files of a WebDataset, of one made by madgen the finished ones. Raises UserError if none."""
    name = source.removeprefix(SCHEME)
    if re.match(r"[a-z][a-z0-9+.-]+:", name) and not Path(name).exists():  # a URL, or a command of webdataset
        raise UserError(f"prompts.source={source}: WebDatasets are read from folders; copy this one to this machine")
    folder = expand_user(name, "prompts.source")
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        return _matching(source, name)
    tars = sorted(path for path in folder.rglob("*") if path.name.lower().endswith(SUFFIXES) and path.is_file())
    if (folder / "dataset.json").is_file():
        tars = [path for path in tars if path.parent == folder / "shards" and path.with_suffix(".json").is_file()]
    if not tars:
        raise UserError(f"prompts.source={source} has no finished tar file; generate the dataset first")
    return tars


def _matching(source: str, pattern: str) -> list[Path]:
    """Return the files of a pattern: of shell wildcards, or of braces as in webdataset, all of which must exist."""
    names = [pattern]
    if "{" in pattern:
        from braceexpand import braceexpand

        try:
            names = list(islice(braceexpand(pattern), MAX_FILES))
        except ValueError as error:
            raise UserError(f"prompts.source={source} has unbalanced braces; quote {{000..009}} in a shell") from error
    paths = [path for name in names for path in (sorted(glob.glob(name)) if glob.has_magic(name) else [name])]
    files = [expand_user(path, "prompts.source") for path in paths]
    missing = next((path for path in files if not path.is_file()), None)
    if missing is not None or not files:
        kind = "tar file" if glob.has_magic(pattern) or "{" in pattern else "folder"
        raise UserError(f"prompts.source={source}: the {kind} {missing or pattern} does not exist")
    return files


def read_dataset(source: str, options: ReadOptions) -> Iterator[Chunk]:
    """Read the samples in order. Raises UserError for a damaged tar file, or a sample without a prompt."""
    tars = dataset_tars(source)
    size = ROWS_COMPRESSED if any(map(_is_compressed, tars)) else ROWS
    yield from in_chunks(_rows(source, tars, options), bool(options.keep), size)


def _rows(source: str, tars: Sequence[Path], options: ReadOptions) -> Iterator[Row]:
    number = 0
    for tar in tars:
        try:
            for key, members in _samples(tar):
                number += 1
                yield number, *_row(f"{source}:{number}: sample {key} in {tar}", key, members, options)
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            raise UserError(f"prompts.source={source}: cannot read {tar}: {error}") from error


def _is_compressed(tar: Path) -> bool:
    return tar.name.lower().endswith(SUFFIXES[1:])


def _samples(path: Path) -> Iterator[tuple[str, dict[str, TarMember | bytes]]]:
    """Yield the key and the members of each sample by suffix: the content of texts, and where pictures are.

    Pictures of compressed tar files are read as well, since they cannot be found again by their place.
    """
    compressed = _is_compressed(path)
    with tarfile.open(path, "r:gz" if compressed else "r:") as tar:
        named = ((match, member) for member in tar if member.isfile() and (match := MEMBER.fullmatch(member.name)))
        for key, group in groupby(((match[1], match[2].lower(), member) for match, member in named), itemgetter(0)):
            members: dict[str, TarMember | bytes] = {}
            for _, suffix, member in group:
                form = suffix.rpartition(".")[2]
                if suffix in members:
                    raise UserError(f"{path}: sample {key} has two members {suffix!r}; remove one of them")
                if form in IMAGES and not compressed:
                    members[suffix] = TarMember(str(path.resolve()), member.offset_data, member.size)
                elif member.size <= MAX_SIZES.get(form, -1):
                    content = tar.extractfile(member)
                    members[suffix] = b"" if content is None else content.read()
            yield key, members


def _row(
    where: str, key: str, members: Mapping[str, TarMember | bytes], options: ReadOptions
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of a sample, and its kept columns."""
    content = _object(where, _member(where, members, "json", ("json",)) or b"{}")
    recorded = isinstance(content.get("prompt_id"), str)  # by madgen
    known = ("prompt", "negative_prompt", "seed", *(("regions",) if recorded else ()))
    names = options.columns or {name: name for name in known}
    row = {field: _field(where, members, content, column) for field, column in names.items()}
    if "prompt" not in options.columns and not isinstance(row.get("prompt"), str):
        text = _member(where, members, "prompt", ("txt",))
        row["prompt"] = None if text is None else _text(where, text).strip()
    if not isinstance(row.get("prompt"), str):
        raise UserError(f"{where} has no prompt, in .txt or as {names.get('prompt', 'prompt')!r} in .json")
    if recorded and "regions" in names:
        row["regions"] = RecordedRegions.parse(where, content)
    row.setdefault("id", _id(key, content))
    for column in PICTURES:
        if column in options.fields and column not in row:
            row[column] = _member(where, members, column, IMAGES)
    columns = content.get("columns")
    kept = dict(columns) if isinstance(columns, dict) else {}
    if options.keep != ALL:
        kept = {name: {**content, **kept}[name] for name in options.keep if name in content or name in kept}
    return row, kept


def _field(where: str, members: Mapping[str, TarMember | bytes], content: Mapping[str, Any], column: str) -> Any:
    """Return a key of a sample's JSON, or else its member of this suffix, such as `left.jpg` or `caption.txt`."""
    if column in content or column.lower() not in members:
        return content.get(column)
    member = members[column.lower()]
    return member if column.lower().rpartition(".")[2] in IMAGES else _text(where, member).strip()


def _member(
    where: str, members: Mapping[str, TarMember | bytes], column: str, forms: Sequence[str]
) -> TarMember | bytes | None:
    """Return the member of a sample for a column in one of `forms`; None if there is none.

    Masks, control and style pictures are named `mask.png`, others `png`, or anything else if they are the only one.
    Raises UserError if there are several.
    """
    part = f"{column}." if column in PICTURES[1:] else ""
    exact = next((suffix for form in forms if (suffix := f"{part}{form}") in members), None)
    if exact is not None or part:
        return None if exact is None else members[exact]
    others = [suffix for suffix in members if suffix.rpartition(".")[2] in forms]
    others = [suffix for suffix in others if suffix.rpartition(".")[0] not in PICTURES[1:]]
    if len(others) > 1 and column == "json":
        return None
    if len(others) > 1:
        raise UserError(
            f"{where} has {', '.join(others)}, as keys end at the first dot; select one with "
            f"prompts.columns.{column}={others[0]}"
        )
    return members[others[0]] if others else None


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
