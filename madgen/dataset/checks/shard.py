"""Check a shard: its tar, its sidecar and its samples."""

from __future__ import annotations

import errno
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from madgen.dataset.checks.sample import Expected, check_sample
from madgen.dataset.checks.tar import read_samples
from madgen.dataset.format import FormatError, SampleEntry, Sidecar
from madgen.dataset.layout import DatasetDir
from madgen.dataset.records import open_file
from madgen.types import shard_index
from madgen.utils.errors import UserError

PROMPT_KEYS = {"prompt_id", "prompt", "negative_prompt", "height", "width"}
"""Fields of a sample's JSON that identify its prompt, beside the seed."""
OTHER_KEYS = set(
    "key sample_index seed blend backbone method sampling safety job_seed fingerprint scores cut_text columns".split()
)


@dataclass(frozen=True, slots=True)
class PlannedSample:
    """A sample as it is recorded, to be compared with the plan."""

    prompt_id: str
    sample_index: int
    seed: int | None
    """None if the sample is damaged."""
    prompt: dict[str, Any] | None = None
    """`PROMPT_KEYS` of its JSON; None if they are unknown, or not everything that identifies the prompt."""


@dataclass
class ShardResult:
    """The result of checking one shard."""

    samples: list[PlannedSample] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    """In the order of the plan, quarantined samples included."""
    present: int = 0
    problems: list[str] = field(default_factory=list)
    whole: list[SampleEntry] = field(default_factory=list)
    """Sidecar entries of the intact samples."""
    changed: int | None = None
    """Modification time of the sidecar in ns; None if it is missing."""
    unread: bool = False
    """Reading failed with a system error other than a missing file; the shard itself may be intact."""
    foreign: bool = False
    """The files belong to another shard or dataset."""


def check_shard(directory: DatasetDir, name: str, planned: int, expected: Expected) -> ShardResult:
    """Read a shard of `planned` samples from beginning to end, with one sample in memory at a time."""
    result, sidecar = ShardResult(changed=sidecar_time(directory, name)), None
    try:
        sidecar = directory.read_sidecar(name)
        result.problems += _check_sidecar(sidecar, name, expected)
        result.foreign = bool(result.problems)
        _check_tar(directory, name, sidecar, expected, result)
    except (OSError, UserError, tarfile.TarError) as error:
        reason = "it cannot be read" if isinstance(error, OSError) else "its tar is damaged"
        result.problems.append(str(error) if isinstance(error, FormatError) else f"{reason}: {error}")
        result.unread = isinstance(error, OSError) and error.errno not in (None, errno.ENOENT)
    if sidecar is not None and not result.unread:
        _add_quarantined(sidecar, expected, result)
        if len(result.keys) != planned:
            result.problems.append(f"it has {len(result.keys)} samples, {planned} are planned")
    if result.foreign:
        result.whole.clear()
    return result


def _check_sidecar(sidecar: Sidecar, name: str, expected: Expected) -> Iterator[str]:
    index = shard_index(name)
    if (sidecar.shard, sidecar.index) != (name, index):
        yield f"its sidecar is that of shard {sidecar.shard!r:.100} (index {sidecar.index})"
    if sidecar.fingerprint is not None and sidecar.fingerprint not in expected.fingerprints:
        yield f"it is a shard {expected.foreign(sidecar.fingerprint)}"


def _check_tar(directory: DatasetDir, name: str, sidecar: Sidecar, expected: Expected, result: ShardResult) -> None:
    """Check the tar's samples; what was checked before it turns out to be damaged is kept in `result`."""
    entries = {entry.key: entry for entry in sidecar.samples}
    with open_file(directory.tar(name)) as stream:
        for sample in read_samples(stream):
            result.keys.append(sample.key)
            result.present += 1
            seed, about = None, {}
            if entry := entries.get(sample.key):
                problems, metadata = check_sample(sample, entry, expected)
                result.problems += [f"{sample.key}: {problem}" for problem in problems]
                if not problems:
                    result.whole.append(entry)
                    seed, about = entry.seed, metadata
            result.samples.append(_planned(sample.key, expected, seed, about))
    if [entry.key for entry in sidecar.samples] != result.keys:
        result.problems.append("its sidecar and its tar do not hold the same keys in the same order")


def _add_quarantined(sidecar: Sidecar, expected: Expected, result: ShardResult) -> None:
    """Insert the quarantined samples, in the order of their positions."""
    for entry in sidecar.quarantine:
        if entry.position > len(result.keys) or entry.key in result.keys:
            result.problems.append(f"{entry.key}: quarantined at position {entry.position}, which is not free")
        result.keys.insert(entry.position, entry.key)
        result.samples.insert(entry.position, _planned(entry.key, expected, entry.seed, {}))


def _planned(key: str, expected: Expected, seed: int | None, metadata: dict[str, Any]) -> PlannedSample:
    number = key.rpartition("-")[2]
    index = int(number) if number.isdecimal() and len(number) < 19 else -1
    complete = metadata.keys() >= PROMPT_KEYS and metadata.keys() <= PROMPT_KEYS | OTHER_KEYS
    prompt = {name: metadata.get(name) for name in (*PROMPT_KEYS, "columns")} if complete else None
    return PlannedSample(expected.manifest.prompt_id(key), index, seed, prompt)


def sidecar_time(directory: DatasetDir, name: str) -> int | None:
    """Return the modification time of a sidecar in ns; None if it is missing."""
    try:
        return os.stat(directory.sidecar(name)).st_mtime_ns
    except OSError:
        return None
