"""Rows as they are read to Prompts; what is wrong with one is told with its place."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from madgen.config.schema import PROMPT_FIELDS
from madgen.prompts.builder import TableBuilder, prompt_id
from madgen.prompts.readers import Chunk
from madgen.prompts.readers._columns import check_known
from madgen.prompts.regions import mask_names, parse_regions
from madgen.prompts.rows import where
from madgen.prompts.sources import Source
from madgen.types import Prompt, Region
from madgen.utils.errors import UserError

ID_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,96}")
MAX_SEED = 2**63 - 1
KNOWN = frozenset(PROMPT_FIELDS)
ID_AND_PROMPT = {"id", "prompt"}
REGION_FIELDS = frozenset(("negative_prompt", "regions", "across"))  # that decide about a line's regions


class Lines:
    """Adds rows to a table; what they leave open is the job's."""

    def __init__(self, negative: str, height: int, width: int, regions: list[Any], across: list[Any]):
        self.negative, self.height, self.width = negative, height, width
        self.parts = {"regions": regions, "across": across}
        self.shared: dict[Path, tuple[Region, ...] | None] = {}

    def add(self, builder: TableBuilder, source: Source, number: int, chunk: Chunk) -> None:
        """Adds the rows of a chunk; UserError names the first that is wrong."""
        if not chunk.rows:
            return
        shared = self._share(builder, source, chunk.lines[0])
        plain = _plain(chunk.rows) if shared == builder.defaults.regions else None
        if plain is not None:
            builder.add_texts(*plain, number, chunk.lines)
            return
        for line, row in zip(chunk.lines, chunk.rows, strict=True):
            fields = {"prompt": row} if isinstance(row, str) else row
            if "regions" in fields:
                builder.masks.update((mask, str(source.folder)) for mask in mask_names(fields))
            place = _Place(source.name, line, fields.get("id"))
            builder.add(self._prompt(place, fields, source.folder, shared), number, line)

    def _share(self, builder: TableBuilder, source: Source, line: int) -> tuple[Region, ...] | None:
        """The job's own regions as they are found from here; None if they are wrong, for the line that needs them."""
        if source.folder not in self.shared:
            try:
                place = _Place(source.name, line, None)
                regions: tuple[Region, ...] | None = self._regions(place, {}, self.negative, source.folder)
            except UserError:
                regions = None
            builder.masks.update((mask, str(source.folder)) for mask in mask_names(self.parts))
            if not self.shared and regions:
                builder.use_regions(regions)
            self.shared[source.folder] = regions
        return self.shared[source.folder]

    def _prompt(self, place: _Place, fields: dict[str, Any], folder: Path, shared: tuple[Region, ...] | None) -> Prompt:
        """The Prompt of a line; `shared`: the job's own regions, if they are good ones."""
        if not fields.keys() <= KNOWN:
            _check_fields(place, fields)
        text, negative = fields.get("prompt"), _given(fields, "negative_prompt", self.negative)
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{place}: the prompt must be a text that is not empty, got {text!r}")
        if not isinstance(negative, str):
            raise UserError(f"{place}: negative_prompt must be a text, got {negative!r}")
        regions = shared if fields.keys().isdisjoint(REGION_FIELDS) else None
        if regions is None:
            regions = self._regions(place, fields, negative, folder)
        _check_text(place, text)
        _check_text(place, negative)
        for region in regions:
            _check_text(place, region.text)
            _check_text(place, region.negative)
        identity = _given(fields, "id", None)
        identity = prompt_id(text) if identity is None else _id(place, identity)
        height, width = _given(fields, "height", self.height), _given(fields, "width", self.width)
        for name, pixels in (("height", height), ("width", width)):
            if type(pixels) is not int or pixels <= 0:
                raise UserError(f"{place}: {name} must be a whole number of pixels > 0, got {pixels!r}")
        seed = fields.get("seed")
        if seed is not None and (type(seed) is not int or not 0 <= seed <= MAX_SEED):
            raise UserError(f"{place}: seed must be a whole number in 0..{MAX_SEED}, got {seed!r}")
        return Prompt(identity, text, negative, height, width, seed, regions)

    def _regions(self, place: _Place, fields: dict[str, Any], negative: str, folder: Path) -> tuple[Region, ...]:
        """A line's own regions replace the job's."""
        own = {name: fields[name] for name in self.parts if fields.get(name) is not None}
        return parse_regions(place, {**(own or self.parts), "negative_prompt": negative}, folder)


class _Place:
    """`file:line`, made a text only where it is needed."""

    __slots__ = ("identity", "line", "source")

    def __init__(self, source: str, line: int, identity: Any):
        self.source, self.line, self.identity = source, line, identity

    def __str__(self) -> str:
        return where(self.source, self.line, self.identity)


def _plain(rows: Sequence[str | dict[str, Any]]) -> tuple[list[str], list[str] | None] | None:
    """Texts and ids (None: all made of the texts) of rows without anything else or wrong; None: look at each row."""
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
    try:
        good = all(map(str.strip, texts)) and b"\0" not in "".join(texts).encode()
    except UnicodeEncodeError:
        return None
    return (texts, ids) if good else None


def _given(fields: dict[str, Any], name: str, default: Any) -> Any:
    value = fields.get(name)
    return default if value is None else value


def _check_fields(place: _Place, fields: dict[str, Any]) -> None:
    unknown = [name for name in fields.keys() - KNOWN if fields[name] is not None]
    if unknown:
        check_known(place, min(unknown))


def _id(place: _Place, identity: Any) -> str:
    identity = str(identity) if type(identity) is int else identity
    if not isinstance(identity, str) or not ID_PATTERN.fullmatch(identity):
        raise UserError(
            f"{place}: id must match [A-Za-z0-9_-]{{1,96}} (webdataset keys hold no dots), got {identity!r}"
        )
    return identity


def _check_text(place: _Place, text: str) -> None:
    if "\0" in text:
        raise UserError(f"{place}: a prompt holds a NUL character; if the file is UTF-16, convert it to UTF-8")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{place}: a prompt holds half of a surrogate pair, which UTF-8 cannot write") from None
