"""`shards/<name>.json`, the sidecar of a shard, with an entry for each sample."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from madgen.dataset.records import NOT_STORED, Finite, FormatError, InvalidValueError, Record

COLUMNS = ("key", "prompt_id", "sample_index", "shard", "offset", "size", "sha256", "seed", "prompt", "height", "width")
"""Columns of `index.parquet` besides scores and kept columns."""
MAX_OFFSET = 2**62
"""Largest offset in bytes."""


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
    open_tar: Path | None = field(default=None, metadata=NOT_STORED)
    """Tar of a sample in a shard that is not finished."""

    @classmethod
    def from_dict(cls, value: Any) -> Self:
        record = super(SampleEntry, cls).from_dict(value)
        for name in ("offset", "size", "height", "width"):
            if getattr(record, name) > MAX_OFFSET:
                raise InvalidValueError(f"is {getattr(record, name)}, expected at most {MAX_OFFSET}", f".{name}")
        return record

    @property
    def shape(self) -> tuple[int, int]:
        """Return height and width in pixels."""
        return self.height, self.width

    @property
    def prompt_id(self) -> str:
        """Return the id of the prompt, the first part of the key."""
        return prompt_id(self.key)

    @property
    def sample_index(self) -> int:
        """Return the number of the sample among those of its prompt. Raises FormatError."""
        if not re.fullmatch(r"[0-9]{1,18}", number := self.key.rpartition("-")[2]):
            raise FormatError(f"{self.shard}: the key {self.key!r:.120} does not end with the number of a sample")
        return int(number)


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
class Environment(Record):
    """What the last bits of a panorama depend on besides its job. Not part of a tar."""

    device: str
    """Name of the GPU or the processor."""
    device_type: str
    """`cuda` or `cpu`."""
    threads: int
    """Threads of PyTorch on a CPU."""
    batch_size: int
    """Panoramas in a batch; the last batch of a shard may be smaller."""
    versions: dict[str, str]
    """Versions of libraries."""


@dataclass(frozen=True, slots=True)
class Sidecar(Record):
    """`shards/<name>.json`: commits the shard when it appears."""

    shard: str
    index: int
    samples: tuple[SampleEntry, ...]
    """In the order of the tar."""
    quarantine: tuple[QuarantineEntry, ...] = ()
    seconds: dict[str, Finite] = field(default_factory=dict)
    """Worker time by activity."""
    view_evaluations: int | None = None
    """Denoised views, summed over all steps."""
    made: int = 0
    """Samples that this worker generated; the others were recovered."""
    started: Finite = 0.0
    """Unix time."""
    finished: Finite = 0.0
    """Unix time."""
    worker: str = ""
    fingerprint: str | None = None
    """Same as in `dataset.json`; None: written by an earlier version, or by `madgen filter`."""
    environment: Environment | None = None
    """Of the worker that finished the shard; None: written by an earlier version, or by `madgen filter`."""

    @classmethod
    def from_dict(cls, value: Any) -> Self:
        record = super(Sidecar, cls).from_dict(value)
        for entry in record.samples:
            object.__setattr__(entry, "shard", record.shard)
        return record

    @property
    def end(self) -> int:
        """Return the size of all samples in bytes."""
        return max((entry.offset + entry.size for entry in self.samples), default=0)

    def as_dict(self) -> dict[str, Any]:
        return {**super(Sidecar, self).as_dict(), "quarantined": [entry.key for entry in self.quarantine]}


@dataclass(frozen=True, slots=True)
class ShardSummary(Record):
    """A sidecar whose samples are not parsed, which makes reading several times faster."""

    samples: list[Any]
    quarantine: tuple[QuarantineEntry, ...] = ()
    seconds: dict[str, Finite] = field(default_factory=dict)
    fingerprint: str | None = None


def prompt_id(key: str) -> str:
    """Return the id of the prompt in the key of a sample."""
    return key.rpartition("-")[0]
