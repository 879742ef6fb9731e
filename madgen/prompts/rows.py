"""A prompt as a row of the table: what it shares with all others is not repeated."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from madgen.prompts.regions import region_identity
from madgen.types import Prompt, Region

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("text", pa.large_string(), nullable=False),
        pa.field("own", pa.string()),  # JSON of what differs from the defaults; null: nothing
        pa.field("regions", pa.string()),  # JSON; null: the defaults' regions
        pa.field("place", pa.int64(), nullable=False),  # source and line, see `place_of`
    ]
)
LINE_BITS = 40
_ENCODER = json.JSONEncoder(ensure_ascii=False, check_circular=False, separators=(",", ":"))


@dataclass(frozen=True)
class Defaults:
    """What a prompt has unless its line says otherwise."""

    negative: str
    height: int
    """Pixels."""
    width: int
    """Pixels."""
    regions: tuple[Region, ...] = ()

    def prompt(self, identity: str, text: str) -> Prompt:
        """A prompt whose line says nothing else."""
        return Prompt(identity, text, self.negative, self.height, self.width, None, self.regions)

    def are_all_of(self, prompt: Prompt) -> bool:
        """Whether a prompt has nothing of its own but its id and its text."""
        return (
            prompt.seed is None
            and prompt.height == self.height
            and prompt.width == self.width
            and prompt.negative == self.negative
            and prompt.regions == self.regions
        )


def encode(prompt: Prompt, defaults: Defaults) -> tuple[str | None, str | None]:
    """The columns `own` and `regions` of a prompt."""
    own: dict[str, Any] = {}
    if prompt.negative != defaults.negative:
        own["negative"] = prompt.negative
    if prompt.height != defaults.height:
        own["height"] = prompt.height
    if prompt.width != defaults.width:
        own["width"] = prompt.width
    if prompt.seed is not None:
        own["seed"] = prompt.seed
    regions = None if prompt.regions == defaults.regions else [region.as_dict() for region in prompt.regions]
    return (_json(own) if own else None), (None if regions is None else _json(regions))


def decode(identity: str, text: str, own: str | None, regions: str | None, defaults: Defaults) -> Prompt:
    """The inverse of `encode`."""
    if own is None and regions is None:
        return defaults.prompt(identity, text)
    fields: dict[str, Any] = {
        "negative": defaults.negative,
        "height": defaults.height,
        "width": defaults.width,
        "seed": None,
    }
    fields |= json.loads(own) if own else {}
    parts = defaults.regions if regions is None else tuple(map(Region.from_dict, json.loads(regions)))
    return Prompt(identity, text, **fields, regions=parts)


def rest_identity(prompt: Prompt) -> str:
    """What affects pixels besides id and text, in one line."""
    return repr(
        (prompt.negative, prompt.height, prompt.width, prompt.seed, *map(region_identity, prompt.regions)),
    )


def place_of(source: int, line: int) -> int:
    """Where a row stands: the number of its source, and its line in it."""
    return source << LINE_BITS | line


def place_name(place: int, identity: str, sources: list[str]) -> str:
    """`file:line`, or `file['id']` in a JSON object, whose lines mean nothing."""
    return where(sources[place >> LINE_BITS], place & ((1 << LINE_BITS) - 1), identity)


def where(source: str, line: int, identity: Any = None) -> str:
    """As `place_name`, of a row that may be wrong."""
    keyed = source.lower().endswith((".json", ".json.gz")) and identity is not None
    return f"{source}[{identity!r}]" if keyed else f"{source}:{line}"


def _json(value: Any) -> str:
    return _ENCODER.encode(value)
