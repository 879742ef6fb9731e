"""Records of a dataset's JSON files: `dataset.json` and `shards/*.json`. Those in `work/` are in `shards/`.

Each has one parser, `from_json`, which raises `FormatError`, and one writer, `to_json`. Fields that files of
earlier versions lack have defaults. Keys that later versions add are ignored, or kept in `extra` where `madgen filter`
copies a record into another dataset.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

from madgen.dataset.records import NOT_STORED, Finite, FormatError, InvalidValueError, Record, to_json
from madgen.types import shard_name

T = TypeVar("T")
MAX_SHARDS = 10**6
SECTIONS = ("backbone", "method", "sampling", "prompts", "output", "scores", "safety", "monitor")
"""Parts of a job that are objects."""
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
class Generation(Record):
    """A stage of a dataset that has grown: the samples that one job added behind those of earlier generations."""

    fingerprint: str
    """Fingerprint of the dataset as of this generation, recorded in the samples that it added."""
    prompts: int
    """Number of prompts that it added."""
    samples_per_prompt: int
    """Number of samples of each prompt from this generation on, those of earlier generations included."""
    prompts_digest: str | None
    """Digest of the prompts that it added; None if not all of them are in the dataset."""
    samples: int
    """Number of samples that it added."""
    shards: int
    """Number of shards that it added, the last of which may be shorter."""
    earlier: str | None = None
    """Which prompts of the job are those of earlier generations, see `madgen.dataset.growth`; None: the first ones."""
    versions: dict[str, Any] = field(default_factory=dict)
    """Library versions."""


@dataclass(frozen=True, slots=True)
class Portion:
    """Consecutive shards of a dataset that one job generated."""

    first: int
    """Index of the first shard."""
    shards: int
    samples: int
    samples_per_shard: int
    fingerprints: frozenset[str]
    """Fingerprints that its samples may have."""
    source: Manifest
    """The manifest of the dataset that generated it."""
    generation: Generation | None
    """None if the plan of its prompts is not known, as for a selection."""

    def planned(self, index: int) -> int:
        """Return the planned number of samples of the shard at `index` in the dataset."""
        return max(0, min(self.samples_per_shard, self.samples - (index - self.first) * self.samples_per_shard))


def portion_at(portions: Sequence[Portion], index: int) -> int:
    """Return which portion has the shard at `index`; the last one if there is no such shard."""
    ends = (portion.first + portion.shards for portion in portions)
    return next((at for at, end in enumerate(ends) if index < end), len(portions) - 1)


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
    generations: tuple[Generation, ...] | None = None
    """Stages of a dataset that has grown, oldest first; None: it has not."""
    sources: tuple[Manifest, ...] | None = None
    """Manifests of merged datasets, with the plan of what was taken of them, in the order of their shards."""
    madgen: int = 1
    """Version of this format."""
    extra: dict[str, Any] = field(default_factory=dict, metadata=NOT_STORED)

    @classmethod
    def from_dict(cls, value: Any) -> Self:
        record = super(Manifest, cls).from_dict(value)
        name = record.job.get("name")
        if type(name) is not str or name == "":
            raise InvalidValueError(f"is {name!r:.60}, expected a string", ".job.name")
        for section, value in record.job.items():
            if section in SECTIONS and type(value) is not dict:
                raise InvalidValueError(f"is {value!r:.60}, expected an object", f".job.{section}")
        if type(record.job.get("output", {}).get("key_prefix", "")) is not str:
            raise InvalidValueError("is no string", ".job.output.key_prefix")
        if record.plan.shards > MAX_SHARDS:
            raise InvalidValueError(f"is {record.plan.shards}, expected at most {MAX_SHARDS}", ".plan.shards")
        if record.madgen != 1:
            raise InvalidValueError(f"is {record.madgen}, and this version of madgen reads 1", ".madgen")
        return record

    def value(self, path: str) -> Any:
        """Return a value of the job or the identity, such as `job.output.format`; None if there is none."""
        value: Any = {"job": self.job, "identity": self.identity}
        for name in path.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return value

    def setting(self, path: str, kind: type[T]) -> T:
        """Return the `value` at a path. Raises FormatError if it is not of this type."""
        value = self.value(path)
        if type(value) is not kind:
            raise FormatError(f"dataset.json is damaged: {path} is {value!r:.60}, expected {kind.__name__}")
        return value

    @property
    def all_generations(self) -> tuple[Generation, ...]:
        """Return the generations; one if the dataset has not grown. Raises FormatError."""
        if self.generations:
            return self.generations
        each = self.setting("identity.prompts.samples_per_prompt", int)
        digest, plan = self.setting("identity.prompts.digest", str), self.plan
        totals = plan.prompts, each, digest, plan.samples, plan.shards
        return (Generation(self.fingerprint or "", *totals, versions=self.versions),)

    @property
    def sample_fingerprints(self) -> frozenset[str]:
        """Return the fingerprints that samples may have: of this dataset, and of those that it was made from."""
        known: set[Any] = {self.fingerprint, *(generation.fingerprint for generation in self.generations or ())}
        known.update(*(source.sample_fingerprints for source in self.sources or ()))
        chosen = self.filtered
        while isinstance(chosen, dict) and isinstance(chosen.get("from"), dict):
            source = chosen["from"]
            known.add(source.get("fingerprint"))
            earlier = source.get("generations")
            known.update(item for item in (earlier if isinstance(earlier, list) else ()) if isinstance(item, str))
            chosen = source.get("filtered")
        return frozenset(item for item in known if isinstance(item, str))

    def portions(self, first: int = 0) -> list[Portion]:
        """Return the portions of the dataset, in the order of the shards; `first`: index of the first shard."""
        if self.sources and self.filtered is None:
            portions: list[Portion] = []
            for source in self.sources:
                portions += source.portions(first + sum(portion.shards for portion in portions))
            return portions
        per_shard, plan = self.plan.samples_per_shard, self.plan
        whole = Portion(first, plan.shards, plan.samples, per_shard, self.sample_fingerprints, self, None)
        if self.filtered is not None and not self.generations:
            return [whole]
        try:
            generations = self.all_generations
        except FormatError:  # of an early version, or damaged
            return [whole]
        portions = []
        for generation in generations:
            known = self.sample_fingerprints if self.filtered else frozenset({generation.fingerprint})
            portions.append(Portion(first, generation.shards, generation.samples, per_shard, known, self, generation))
            first += generation.shards
        return portions

    def portion(self, index: int) -> Portion:
        """Return the portion of the shard at `index`; the last one if there is no such shard."""
        portions = self.portions()
        return portions[portion_at(portions, index)]

    def shard_fingerprint(self, index: int) -> str | None:
        """Return the fingerprint of the generation that the shard at `index` belongs to."""
        generation = self.portion(index).generation
        return self.fingerprint if generation is None else generation.fingerprint

    @property
    def made_by(self) -> str | None:
        """Return the command that made the dataset from others: `filter`, `split` or `merge`; None: `generate`."""
        if self.filtered is not None:
            return "split" if "split" in self.filtered else "filter"
        return "merge" if self.sources else None

    def source_of(self, fingerprint: Any) -> Manifest:
        """Return the manifest of the merged dataset that has samples of a fingerprint; this one if there is none."""
        sources = (source for source in self.sources or () if fingerprint in source.sample_fingerprints)
        return next(sources, self)

    @property
    def name(self) -> str:
        """Return the name of the job."""
        return self.job["name"]

    @property
    def key_prefix(self) -> str:
        """Return the start of every key, before the id of its prompt."""
        return self.job.get("output", {}).get("key_prefix", "")

    @property
    def key_prefixes(self) -> frozenset[str]:
        """Return the starts of keys: one, except for merged datasets."""
        if not self.sources:
            return frozenset({self.key_prefix})
        return frozenset().union(*(source.key_prefixes for source in self.sources))

    def prompt_id(self, key: str) -> str:
        """Return the id of the prompt in the key of a sample, without the prefix of the dataset."""
        prefixes = (prefix for prefix in self.key_prefixes if key.startswith(prefix))
        return prompt_id(key).removeprefix(max(prefixes, key=len, default=""))

    def shard_names(self) -> list[str]:
        """Return the names of the planned shards, in order. Raises FormatError if they cannot be names of files."""
        if not re.fullmatch(r"[^/\0]{1,200}", self.name):
            raise FormatError(f"dataset.json: job.name is {self.name!r:.60}, which cannot be the name of a file")
        return [shard_name(self.name, index) for index in range(self.plan.shards)]

    def to_json(self) -> bytes:
        return to_json(self.as_dict(), indent=1)
