"""Parse rows into Prompts; errors start with the location of the row."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import suppress
from datetime import date, datetime, time
from decimal import Decimal
from itertools import repeat
from pathlib import Path
from typing import Any

from madgen.config.schema import PromptsConfig
from madgen.images.masks import embed_mask
from madgen.prompts.builder import TableBuilder
from madgen.prompts.characters import BYTE_ORDER_MARK, invalid_character, is_blank, is_clean
from madgen.prompts.picture_columns import PictureColumns, check_known
from madgen.prompts.picture_files import named_file, prefetch
from madgen.prompts.readers import ALL, Chunk
from madgen.prompts.regions import RecordedRegions, mask_names, parse_regions
from madgen.prompts.remote import download_masks
from madgen.prompts.rows import Location, default_id
from madgen.prompts.sources import PromptSource
from madgen.types import PictureFile, Prompt, Region
from madgen.utils.errors import UserError

PREFETCHED = 256
"""Rows whose pictures are downloaded at once."""
ID_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,96}")
MAX_SEED = 2**64 - 1
MAX_FLOAT = 2**53  # whole numbers above it may be rounded
ID_AND_PROMPT = {"id", "prompt"}
REGION_FIELDS = frozenset(("negative_prompt", "regions", "across"))  # fields that affect a row's regions


class RowParser:
    """Parses rows of all sources; fields that a row does not set have the job's values."""

    def __init__(self, config: PromptsConfig, height: int, width: int, pictures: PictureColumns):
        self.config, self.height, self.width, self.pictures = config, height, width, pictures
        self.masks: set[tuple[str, str | None]] = set()
        """(name, folder) of the masks and pictures in rows."""
        self._known = frozenset(self.pictures.fields)
        self._keep = () if config.keep_columns in (None, ALL) else tuple(config.keep_columns)
        self._missing = set(self._keep)
        self._job_regions: dict[Path | None, tuple[Region, ...] | None] = {}

    def job_regions(self, source: PromptSource) -> tuple[Region, ...] | None:
        """Return the job's regions, mask files relative to a source; None if they are invalid."""
        if source.folder not in self._job_regions:
            regions = None
            with suppress(UserError):  # raised again by the first row that uses them
                regions = self._regions(Location(source.name, 1), {}, self.config.negative_prompt, source)
            self._job_regions[source.folder] = regions
        return self._job_regions[source.folder]

    def add(self, builder: TableBuilder, source: PromptSource, number: int, chunk: Chunk) -> None:
        """Add the rows of a chunk. Raises UserError for the first invalid one."""
        shared = self.job_regions(source)
        is_plain = shared == builder.defaults.regions and chunk.extras is None and not self.pictures.names
        plain = _plain(chunk.rows) if is_plain else None
        if plain is not None:
            builder.add_texts(*plain, number, chunk.lines)
            return
        extras = chunk.extras or repeat(None, len(chunk.rows))
        access = source.access(self.config, confined=not self.config.allow_masks_outside)
        for position, (line, row, kept) in enumerate(zip(chunk.lines, chunk.rows, extras, strict=True)):
            if self.pictures.names and position % PREFETCHED == 0 and not builder.full:
                ahead = [row for row in chunk.rows[position : position + PREFETCHED] if isinstance(row, dict)]
                prefetch(((name, row.get(name)) for row in ahead for name in self.pictures.names), access)
            fields = {"prompt": row} if isinstance(row, str) else row
            location = Location(source.name, line, fields.get("id"))
            self._note_files(location, fields, source)
            columns = {}
            if kept is not None:
                values = {**dict.fromkeys(self._keep), **kept}
                columns = {name: _json_value(location, name, value) for name, value in values.items()}
                self._missing.difference_update(kept)
            builder.add(self._prompt(location, fields, source, shared, columns), number, line)

    def _note_files(self, where: Location, fields: dict[str, Any], source: PromptSource) -> None:
        """Download the masks that a row of a remote file names; note the files that another one names."""
        names = mask_names(fields) if "regions" in fields else []
        if source.remote is not None:
            download_masks(source.remote, where, names)
            return
        names += [name for column in self.pictures.names if (name := named_file(fields.get(column)))]
        folder = None if source.folder is None else str(source.folder)
        self.masks.update((name, folder) for name in names)

    def check_kept(self) -> None:
        """Raise UserError if no row has a column of `prompts.keep_columns`."""
        if self._missing:
            raise UserError(
                f"prompts.keep_columns: no row of {self.config.source} has {min(self._missing)!r}; correct the name"
            )

    def _prompt(
        self,
        where: Location,
        fields: dict[str, Any],
        source: PromptSource,
        shared: tuple[Region, ...] | None,
        columns: dict[str, Any],
    ) -> Prompt:
        if not fields.keys() <= self._known:
            unknown = [name for name in fields.keys() - self._known if fields[name] is not None]
            if unknown:
                check_known(where, min(unknown), self.pictures.fields)
        text = _text(where, "the prompt", fields.get("prompt"))
        negative = _value(fields, "negative_prompt", self.config.negative_prompt)
        if not isinstance(negative, str):
            raise UserError(f"{where}: negative_prompt must be a string, got {negative!r}")
        negative = _checked(where, "negative_prompt", negative)
        identity = _value(fields, "id", None)
        identity = default_id(text) if identity is None else _id(where, identity)
        pictures: dict[str, PictureFile] = {}
        left_top = None
        height, width = _size(where, fields, self.height, self.width)
        if self.pictures.names:
            has_size = any(_number(fields, name, None) is not None for name in ("height", "width"))
            access = source.access(self.config, confined=not self.config.allow_masks_outside)
            pictures, left_top, (height, width) = self.pictures.read(where, fields, access, (height, width), has_size)
        regions = shared if fields.keys().isdisjoint(REGION_FIELDS) else None
        if isinstance(recorded := fields.get("regions"), RecordedRegions):
            regions = recorded.at(where, height, width, left_top is not None)
        elif regions is None:
            regions = self._regions(where, fields, negative, source)
        for region in regions:
            _checked(where, "the prompt of a region", region.text)
            _checked(where, "the negative_prompt of a region", region.negative)
        seed = _number(fields, "seed", None)
        if seed is not None and (type(seed) is not int or not 0 <= seed <= MAX_SEED):
            raise UserError(f"{where}: seed must be an integer in 0..{MAX_SEED}, got {seed!r}")
        return Prompt(identity, text, negative, height, width, seed, regions, columns, pictures, left_top)

    def _regions(
        self, where: Location, fields: dict[str, Any], negative: str, source: PromptSource
    ) -> tuple[Region, ...]:
        """Parse a row's own regions, or else the job's."""
        own = {name: fields[name] for name in ("regions", "across") if fields.get(name) is not None}
        parts = own or {"regions": self.config.regions, "across": self.config.across}
        confined = bool(own) and not self.config.allow_masks_outside
        regions = parse_regions(where, {**parts, "negative_prompt": negative}, source.folder, confined)
        if own and source.remote is not None:  # other processes do not see the downloaded files
            return tuple(map(embed_mask, regions))
        return regions


def _plain(rows: Sequence[str | dict[str, Any]]) -> tuple[list[str], list[str] | None] | None:
    """Return prompts and ids (None: default ids) of valid rows without other fields; None if any row is different."""
    if dict not in set(map(type, rows)):
        texts: list[str] = list(rows)  # type: ignore[arg-type]
        ids = None
    elif all(type(row) is dict and row.keys() == ID_AND_PROMPT for row in rows):
        texts = [row["prompt"] for row in rows]  # type: ignore[index]
        ids = [row["id"] for row in rows]  # type: ignore[index]
        if set(map(type, (*texts, *ids))) != {str} or not all(map(ID_PATTERN.fullmatch, ids)):
            return None
    else:
        return None
    joined = " ".join(texts)
    valid = all(map(str.strip, texts)) and is_clean(joined)
    if valid and not joined.isascii():
        valid = not any(map(is_blank, texts))
    return (texts, ids) if valid else None


def _value(fields: dict[str, Any], name: str, default: Any) -> Any:
    """Return a field, or the default if it is null or NaN, as libraries write missing values."""
    value = fields.get(name)
    return default if value is None or value != value else value


def _number(fields: dict[str, Any], name: str, default: int | None) -> Any:
    """Return a field as an integer if it is a whole number; blank strings are not set."""
    value = _value(fields, name, default)
    if isinstance(value, str) and not value.strip():
        return default
    if isinstance(value, float | Decimal) and abs(float(value)) <= MAX_FLOAT and value % 1 == 0:
        return int(value)
    return value


def _size(where: Location, fields: dict[str, Any], height: int, width: int) -> tuple[int, int]:
    size = _number(fields, "height", height), _number(fields, "width", width)
    for name, pixels in zip(("height", "width"), size, strict=True):
        if type(pixels) is not int or pixels <= 0:
            raise UserError(f"{where}: {name} must be an integer > 0 (pixels), got {pixels!r}")
    return size


def _id(where: Location, identity: Any) -> str:
    identity = str(identity) if type(identity) is int else identity
    if not isinstance(identity, str) or not ID_PATTERN.fullmatch(identity):
        raise UserError(
            f"{where}: id must match [A-Za-z0-9_-]{{1,96}} (a WebDataset key contains no dots), got {identity!r}"
        )
    return identity


def _text(where: Location, name: str, value: Any) -> str:
    """Return a text without a byte order mark. Raises UserError if it is not a string or has no visible character."""
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {name} must be a non-empty string, got {value!r}")
    text = _checked(where, name, value)
    if is_blank(text):
        raise UserError(f"{where}: {name} must be a non-empty string with a visible character, got {value!a}")
    return text


def _checked(where: Location, name: str, text: str) -> str:
    """Return a text without a byte order mark. Raises UserError if it contains an invalid character."""
    text = text.lstrip(BYTE_ORDER_MARK)  # concatenating files leaves them
    problem = invalid_character(text)
    if problem is not None:
        raise UserError(f"{where}: {name} {problem}")
    return text


def _json_value(where: object, name: str, value: Any) -> Any:
    """Return the value of a kept column as a JSON value. Raises UserError for one that JSON cannot represent.

    NaN becomes null, dates and times become ISO 8601 strings.
    """
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return _json_text(where, name, value)
    if isinstance(value, float | Decimal):
        if math.isinf(value):
            raise UserError(f"{where}: column {name!r} is {value}, which JSON cannot represent; remove the value")
        return None if math.isnan(value) else float(value)
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, list | tuple):
        return [_json_value(where, name, item) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {_json_text(where, name, key): _json_value(where, name, item) for key, item in value.items()}
    raise UserError(
        f"{where}: column {name!r} holds a {type(value).__name__}, which JSON cannot represent; leave it out of "
        "prompts.keep_columns"
    )


def _json_text(where: object, name: str, value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{where}: column {name!r} contains half of a surrogate pair, which UTF-8 cannot encode; remove it"
        ) from None
    return value
