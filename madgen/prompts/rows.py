"""Rows of a prompt table: only what differs from the job's defaults is stored with a prompt."""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

import pyarrow as pa

from madgen.prompts.regions import region_identity
from madgen.types import PictureFile, Prompt, Region

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("text", pa.large_string(), nullable=False),
        pa.field("own", pa.string()),  # JSON of the fields that differ from the defaults; null: none
        pa.field("regions", pa.string()),  # JSON; null: the default regions
        pa.field("columns", pa.string()),  # JSON of kept columns; null: none
        pa.field("place", pa.int64(), nullable=False),  # source and line, see `pack_place`
    ]
)
LINE_BITS = 40
_json = json.JSONEncoder(ensure_ascii=False, check_circular=False, separators=(",", ":")).encode


def default_id(text: str) -> str:
    """Return the id of a prompt whose row has none: 16 hex digits of a hash of its text."""
    return blake2b(text.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Defaults:
    """Values of a prompt whose row does not set them."""

    negative: str
    height: int
    """Pixels."""
    width: int
    """Pixels."""
    regions: tuple[Region, ...] = ()

    def prompt(self, identity: str, text: str) -> Prompt:
        """Return a prompt with these values."""
        return Prompt(identity, text, self.negative, self.height, self.width, None, self.regions)

    def match(self, prompt: Prompt) -> bool:
        """Return whether a prompt has these values, apart from its id and text."""
        own = prompt.negative, prompt.height, prompt.width, prompt.seed, prompt.regions
        defaults = self.negative, self.height, self.width, None, self.regions
        return own == defaults and not prompt.columns and not prompt.pictures


def encode(prompt: Prompt, defaults: Defaults) -> tuple[str | None, str | None, str | None]:
    """Return the columns `own`, `regions` and `columns` of a prompt."""
    pairs = ((name, getattr(prompt, name), getattr(defaults, name)) for name in ("negative", "height", "width"))
    own: dict[str, Any] = {name: value for name, value, default in pairs if value != default}
    if prompt.seed is not None:
        own["seed"] = prompt.seed
    if prompt.pictures:
        own["pictures"] = {column: picture.as_dict() for column, picture in prompt.pictures.items()}
    if prompt.place is not None:
        own["place"] = prompt.place
    regions = None if prompt.regions == defaults.regions else _json([region.as_dict() for region in prompt.regions])
    return (_json(own) if own else None), regions, (_json(prompt.columns) if prompt.columns else None)


def decode(
    defaults: Defaults, identity: str, text: str, own: str | None, regions: str | None, columns: str | None
) -> Prompt:
    """Invert `encode`."""
    if own is None and regions is None and columns is None:
        return defaults.prompt(identity, text)
    fields: dict[str, Any] = {**vars(defaults), "id": identity, "text": text}
    fields |= json.loads(own) if own else {}
    if "pictures" in fields:
        pictures = fields["pictures"].items()
        fields["pictures"] = {column: PictureFile.from_dict(picture) for column, picture in pictures}
    if "place" in fields:
        fields["place"] = tuple(fields["place"])
    if regions is not None:
        fields["regions"] = tuple(map(Region.from_dict, json.loads(regions)))
    return Prompt(**fields, columns=json.loads(columns) if columns else {})


def rest_identity(prompt: Prompt) -> str:
    """Return everything besides id and text that affects the bytes of a sample, as one line."""
    size = prompt.height, prompt.width
    rest: tuple[Any, ...] = (prompt.negative, *size, prompt.seed, *map(region_identity, prompt.regions))
    if prompt.pictures:
        contents = {column: picture.sha256 for column, picture in prompt.pictures.items()}
        rest = (*rest, sorted(contents.items()), prompt.place)
    return f"{rest!r} {json.dumps(prompt.columns, sort_keys=True)}" if prompt.columns else repr(rest)


def pack_place(source: int, line: int) -> int:
    """Return the column `place`: the index of a source and a line in it, as one integer."""
    return source << LINE_BITS | line


def unpack_place(place: int, identity: str, sources: list[str]) -> Location:
    """Invert `pack_place`; `sources`: names by index."""
    return Location(sources[place >> LINE_BITS], place & ((1 << LINE_BITS) - 1), identity)


class Location(NamedTuple):
    """Position of a row, for messages: `file:line`, or `file['id']` or `file: item 3` in JSON."""

    source: str
    line: int
    identity: Any = None

    def __str__(self) -> str:
        if not self.source.lower().endswith((".json", ".json.gz")):
            return f"{self.source}:{self.line}"
        return f"{self.source}: item {self.line}" if self.identity is None else f"{self.source}[{self.identity!r}]"
