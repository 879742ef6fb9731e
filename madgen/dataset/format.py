"""Parse and write a dataset's JSON files: `dataset.json` (`Manifest`) and `shards/*.json` (`Sidecar`, `SampleEntry`).

Each file has one parser, `from_json`, which raises `FormatError`, and one writer, `to_json`. Fields that files of
earlier versions lack have defaults. Keys that later versions add are ignored, or kept in `extra` where `madgen filter`
copies a record into another dataset.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Self, get_args, get_origin, get_type_hints

from madgen.types import shard_name
from madgen.utils.errors import UserError

COLUMNS = ("key", "prompt_id", "sample_index", "shard", "offset", "size", "sha256", "seed", "prompt", "height", "width")
"""Columns of `index.parquet` besides scores and kept columns."""
NOT_STORED = {"stored": False}
"""Metadata of fields that are not keys of the JSON object."""


class FormatError(UserError):
    """A file is not in madgen's format; the message names the file, the key and its value."""


class InvalidValueError(Exception):
    """A value has the wrong type; `path` holds the keys that lead to it."""

    def __init__(self, problem: str, path: str = ""):
        super().__init__(f"{path.lstrip('.') or 'its content'} {problem}")
        self.problem, self.path = problem, path

    def below(self, key: str) -> InvalidValueError:
        """Return the same error with `key` prepended to its path."""
        return InvalidValueError(self.problem, key + self.path)


def to_json(value: Any, indent: int | None = None) -> bytes:
    """Encode a value as UTF-8 JSON with sorted keys: equal values give equal bytes."""
    return (json.dumps(value, sort_keys=True, ensure_ascii=False, indent=indent) + "\n").encode()


class Record:
    """Convert a dataclass from and to a JSON object; values must have the types of the field annotations."""

    __slots__ = ()

    @classmethod
    def from_json(cls, data: str | bytes, file: Path | str) -> Self:
        """Parse the content of `file`. Raises FormatError."""
        try:
            return cls.from_dict(json.loads(data))
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{file} is damaged: {error}") from error
        except InvalidValueError as error:
            raise FormatError(f"{file} is damaged: {error}") from None

    @classmethod
    def from_dict(cls, value: Any) -> Self:
        """Convert a JSON object. Raises InvalidValueError."""
        if type(value) is not dict:
            raise InvalidValueError(f"is {value!r:.60}, expected an object")
        values = {}
        for name, parse, required in _schema(cls):  # type: ignore[arg-type]
            try:
                if name in value:
                    values[name] = parse(value[name])
                elif required:
                    raise InvalidValueError("is missing")
            except InvalidValueError as error:
                raise error.below(f".{name}") from None
        if len(values) < len(value) and "extra" in cls.__slots__:
            values["extra"] = {name: value[name] for name in value.keys() - values.keys()}
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON object, without optional fields that are None."""
        result = dict(getattr(self, "extra", {}))
        for item in _stored(type(self)):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            if value is not None or item.default is MISSING:
                result[item.name] = _plain(value)
        return result

    def to_json(self) -> bytes:
        """Return the content of the record's file."""
        return to_json(self.as_dict())


@dataclass(frozen=True, slots=True)
class SampleEntry(Record):
    """A sample of a finished shard: `size` bytes of tar records (headers and padding included) from byte `offset`."""

    key: str
    seed: int
    prompt: str
    offset: int
    size: int
    sha256: str
    """Checksum of these bytes."""
    height: int
    """Pixels."""
    width: int
    """Pixels."""
    scores: dict[str, float] | None = None
    """Same as in the JSON of the sample."""
    shard: str = field(default="", metadata=NOT_STORED)
    """Name of the shard."""
    extra: dict[str, Any] = field(default_factory=dict, metadata=NOT_STORED)
    columns: dict[str, Any] | None = None
    """Kept columns of the prompt file, same as in the JSON of the sample."""

    @property
    def shape(self) -> tuple[int, int]:
        """Return height and width in pixels."""
        return self.height, self.width

    @property
    def prompt_id(self) -> str:
        """Return the id of the prompt, the first part of the key."""
        return prompt_id(self.key)


@dataclass(frozen=True, slots=True)
class QuarantineEntry(Record):
    """A planned sample that could not be generated."""

    key: str
    seed: int
    prompt: str
    position: int
    """Index of the sample in the shard, quarantined samples included."""
    reason: str
    """Identifier of the failure, such as `out_of_memory`."""
    detail: str


@dataclass(frozen=True, slots=True)
class Sidecar(Record):
    """`shards/<name>.json`: commits the shard when it appears."""

    shard: str
    index: int
    samples: tuple[SampleEntry, ...]
    """In the order of the tar."""
    quarantine: tuple[QuarantineEntry, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    """Worker time by activity."""
    view_evaluations: int | None = None
    """Denoised views, summed over all steps."""
    made: int = 0
    """Samples that this worker generated; the others were recovered."""
    started: float = 0.0
    """Unix time."""
    finished: float = 0.0
    """Unix time."""
    worker: str = ""

    @classmethod
    def from_dict(cls, value: Any) -> Self:
        record = super(Sidecar, cls).from_dict(value)
        for entry in record.samples:
            object.__setattr__(entry, "shard", record.shard)
        return record

    def as_dict(self) -> dict[str, Any]:
        return {**super(Sidecar, self).as_dict(), "quarantined": [entry.key for entry in self.quarantine]}


@dataclass(frozen=True, slots=True)
class ShardSummary(Record):
    """A sidecar whose samples are not parsed, which makes reading several times faster."""

    samples: list[Any]
    quarantine: tuple[QuarantineEntry, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PlanTotals(Record):
    """The size of a plan."""

    prompts: int
    samples: int
    shards: int
    samples_per_shard: int
    keys_sha256: str
    """Checksum of every planned key, one per line, in order."""


@dataclass(frozen=True, slots=True)
class Manifest(Record):
    """`dataset.json`: the job of a dataset, and the identity that a job must match to resume it."""

    fingerprint: str | None
    """Hash of `identity`; None before the weights are known."""
    job: dict[str, Any]
    """The resolved job, with the keys of the version that wrote it."""
    plan: PlanTotals
    identity: dict[str, Any] = field(default_factory=dict)
    """Everything that affects the bytes of the shards."""
    licence: dict[str, Any] | None = None
    filtered: dict[str, Any] | None = None
    """Source and selection of a dataset that `madgen filter` wrote."""
    versions: dict[str, Any] = field(default_factory=dict)
    """Library versions."""
    madgen: int = 1
    """Version of this format."""
    extra: dict[str, Any] = field(default_factory=dict, metadata=NOT_STORED)

    @classmethod
    def from_dict(cls, value: Any) -> Self:
        record = super(Manifest, cls).from_dict(value)
        if type(record.job.get("name")) is not str:
            raise InvalidValueError(f"is {record.job.get('name')!r:.60}, expected a string", ".job.name")
        return record

    @property
    def name(self) -> str:
        """Return the name of the job."""
        return self.job["name"]

    @property
    def key_prefix(self) -> str:
        """Return the start of every key, before the id of its prompt."""
        return (self.job.get("output") or {}).get("key_prefix") or ""

    def shard_names(self) -> list[str]:
        """Return the names of the planned shards, in order."""
        return [shard_name(self.name, index) for index in range(self.plan.shards)]

    def to_json(self) -> bytes:
        return to_json(self.as_dict(), indent=1)


def prompt_id(key: str) -> str:
    """Return the id of the prompt in the key of a sample."""
    return key.rpartition("-")[0]


@cache
def _stored(record: Any) -> list[Any]:
    return [item for item in fields(record) if item.metadata != NOT_STORED]


@cache
def _schema(record: Any) -> list[tuple[str, Callable[[Any], Any], bool]]:
    """Return the name and parser of every stored field, and whether it is required."""
    types = get_type_hints(record)
    return [
        (item.name, _parser(types[item.name]), item.default is MISSING and item.default_factory is MISSING)
        for item in _stored(record)
    ]


def _check(value: Any, valid: bool, expected: str) -> Any:
    if not valid:
        raise InvalidValueError(f"is {value!r:.60}, expected {expected}")
    return value


PLAIN: dict[Any, Callable[[Any], Any]] = {
    str: lambda value: _check(value, type(value) is str, "a string"),
    int: lambda value: _check(value, type(value) is int and value >= 0, "an integer >= 0"),
    float: lambda value: _check(value, type(value) in (int, float), "a number"),
    dict[str, Any]: lambda value: _check(value, type(value) is dict, "an object"),
    list[Any]: lambda value: _check(value, type(value) is list, "a list"),
}


def _parser(kind: Any) -> Callable[[Any], Any]:
    """Return the parser of a plain type, a record, `X | None`, `dict[str, X]` or `tuple[X, ...]`."""
    if kind in PLAIN:
        return PLAIN[kind]
    if isinstance(kind, type) and issubclass(kind, Record):
        return kind.from_dict
    origin = get_origin(kind)
    parse = _parser(get_args(kind)[1 if origin is dict else 0])
    if origin is UnionType:
        return lambda value: None if value is None else parse(value)

    def parse_all(value: Any) -> Any:
        _check(value, type(value) is (dict if origin is dict else list), "an object" if origin is dict else "a list")
        parsed = {}
        for at, item in value.items() if origin is dict else enumerate(value):
            try:
                parsed[at] = parse(item)
            except InvalidValueError as error:
                raise error.below(f".{at}" if origin is dict else f"[{at}]") from None
        return parsed if origin is dict else tuple(parsed.values())

    return parse_all


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.as_dict()
    return [item.as_dict() for item in value] if isinstance(value, tuple) else value
