"""Merge datasets into one: the shards of one after those of the other, each key once.

Shards are hard links to those of the sources, or copies. They are written again if their keys get a prefix, or if
samples are left out because the source is unfinished or an earlier source has them.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b, sha256
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np

from madgen.dataset.checks.sample import SETTINGS
from madgen.dataset.checks.tar import check_size
from madgen.dataset.filtering.filter import assign, reading_shards, selected_manifest, warn_if_unfinished
from madgen.dataset.format import Manifest, PlanTotals, SampleEntry, Sidecar, prompt_id
from madgen.dataset.identity import fingerprint
from madgen.dataset.index import write_index, write_quarantine
from madgen.dataset.layout import DatasetDir
from madgen.dataset.manifest import differences
from madgen.dataset.new_directory import new_directory
from madgen.dataset.reader import read_entry
from madgen.dataset.shards.copying import selected_entries, write_shard, write_tar
from madgen.types import shard_index, shard_name
from madgen.utils.atomic import check_new_directory, sync_directory, write_atomically
from madgen.utils.console import plural
from madgen.utils.errors import UserError

logger = logging.getLogger(__name__)

KEY_PREFIX = re.compile(r"[A-Za-z0-9_-]{0,32}")


@dataclass
class Source:
    """A dataset to merge; a merged one counts as the datasets that it was made from."""

    directory: DatasetDir
    manifest: Manifest
    prefix: str
    """Prefix of its keys."""
    names: list[str]
    """Its finished shards, in order."""
    is_finished: bool
    left_out: set[str] = field(default_factory=set)
    """Keys that an earlier source has."""

    @property
    def stays(self) -> bool:
        """Return whether its shards are merged as they are, apart from the prefix."""
        return self.is_finished and not self.left_out

    def sidecars(self) -> Iterator[Sidecar]:
        """Yield the sidecars of its finished shards, in order."""
        return (self.directory.read_sidecar(name) for name in self.names)

    def entries(self) -> Iterator[SampleEntry]:
        """Yield its samples, in order."""
        return (entry for sidecar in self.sidecars() for entry in sidecar.samples)


def merge(
    roots: Sequence[Path], target: Path, mixed: bool = False, prefixes: Sequence[str] = (), copy: bool = False
) -> None:
    """Write a dataset of all samples of some datasets, published by rename, and print their number.

    `mixed`: merge datasets of different settings. `prefixes`: of the keys of each dataset, or of all but the first;
    none: keys stay as they are. `copy`: copy shards rather than link them.
    Raises UserError, before anything is written, if datasets have different settings or different pictures of a key.
    """
    sources = _open(roots, _prefixes(len(roots), prefixes))
    check_new_directory(target)
    _check_settings(sources, mixed)
    with reading_shards():
        _leave_out_duplicates(sources)
        with new_directory(target) as temporary:
            content = _write(sources, DatasetDir(temporary), copy)
    for source in sources:
        root, left_out = source.directory.root, len(source.left_out)
        if not source.is_finished:
            warn_if_unfinished(source.directory, sum(1 for _ in source.entries()), source.manifest)
        if left_out:
            logger.warning(f"left out {plural(left_out, 'sample')} of {root}, which an earlier dataset has")
    print(f"{target}: {plural(content.plan.samples, 'sample')} of {plural(len(roots), 'dataset')}")


def _prefixes(datasets: int, prefixes: Sequence[str]) -> list[str]:
    if datasets < 2:
        raise UserError("name at least two datasets to merge")
    if prefixes and len(prefixes) not in (datasets - 1, datasets):
        raise UserError(
            f"--prefix has {len(prefixes)} prefixes for {datasets} datasets; "
            "give one for each, or for all but the first, separated by commas"
        )
    for prefix in prefixes:
        if not KEY_PREFIX.fullmatch(prefix):
            raise UserError(f"--prefix: {prefix!r} must be at most 32 of [A-Za-z0-9_-]")
    return [*[""] * (datasets - len(prefixes)), *prefixes]


def _open(roots: Sequence[Path], prefixes: Sequence[str]) -> list[Source]:
    sources: list[Source] = []
    resolved = [root.resolve() for root in roots]
    for root, prefix in zip(roots, prefixes, strict=True):
        if resolved.count(root.resolve()) > 1:
            raise UserError(f"{root} is named twice; merge each dataset once")
        directory = DatasetDir(root)
        manifest, done = directory.read_manifest(), directory.done()
        planned = manifest.shard_names()
        parts, first = (manifest.sources if manifest.sources and manifest.filtered is None else (manifest,)), 0
        for part in parts:
            names = planned[first : first + sum(portion.shards for portion in part.portions())]
            finished = [name for name in names if name in done]
            sources.append(Source(directory, part, prefix, finished, len(finished) == len(names)))
            first += len(names)
    if not any(source.names for source in sources):
        raise UserError(f"{', '.join(map(str, roots))} have no finished sample yet")
    return sources


def _check_settings(sources: Sequence[Source], mixed: bool) -> None:
    """Raise UserError for different settings, unless they are to be `mixed`, and for different image formats."""
    first = sources[0]
    for other in sources[1:]:
        names = f"{first.directory.root} and {other.directory.root}"
        formats = [source.manifest.setting("job.output.format", str) for source in (first, other)]
        if formats[0] != formats[1]:
            raise UserError(f"{names} have different image formats ({', '.join(formats)}), which no reader expects")
        changed = differences(_settings(first.manifest), _settings(other.manifest))
        if changed and not mixed:
            raise UserError(f"{names} have different settings ({'; '.join(changed)}); --mixed merges them nevertheless")


def _settings(manifest: Manifest) -> dict[str, Any]:
    """Return the settings that affect the pictures of given prompts and seeds."""
    output = {"quality": manifest.value("identity.output.quality")}
    return {name: manifest.identity.get(name) for name in SETTINGS} | {"output": output}


def _leave_out_duplicates(sources: Sequence[Source]) -> None:
    """Leave out samples that an earlier source has. Raises UserError if their pictures or prompts differ."""
    repeated = _repeated_hashes(sources)
    if not repeated:
        return
    known: dict[str, tuple[Source, SampleEntry]] = {}
    for source in sources:
        for entry in source.entries():
            key = f"{source.prefix}{entry.key}"
            if _hash(key) not in repeated:
                continue
            if key in known:
                _check_same(key, *known[key], source, entry)
                source.left_out.add(entry.key)
            known.setdefault(key, (source, entry))
    quarantined: set[str] = set()
    for source in sources:
        for lost in (lost for sidecar in source.sidecars() for lost in sidecar.quarantine):
            key = f"{source.prefix}{lost.key}"
            if key in known or key in quarantined:
                source.left_out.add(lost.key)
            if _hash(key) in repeated:
                quarantined.add(key)


def _repeated_hashes(sources: Sequence[Source]) -> set[int]:
    """Return the hashes of the keys that occur more than once, and perhaps of a few others."""
    hashes = [
        np.fromiter(
            (_hash(f"{source.prefix}{key}") for sidecar in source.sidecars() for key in keys_of(sidecar)), np.uint64
        )
        for source in sources
    ]
    values, counts = np.unique(np.concatenate(hashes), return_counts=True)
    return set(values[counts > 1].tolist())


def _hash(key: str) -> int:
    return int.from_bytes(blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest())


def _check_same(key: str, first: Source, one: SampleEntry, second: Source, two: SampleEntry) -> None:
    """Raise UserError unless two samples have the same prompt, seed and pixels."""
    if one.sha256 == two.sha256:
        return
    same = (one.prompt, one.seed, one.shape) == (two.prompt, two.seed, two.shape)
    if same:
        same = np.array_equal(read_entry(first.directory, one).image_HWC, read_entry(second.directory, two).image_HWC)
    if not same:
        raise UserError(
            f"{first.directory.root} and {second.directory.root} have different pictures or prompts of {key}; "
            "keep their keys apart with --prefix, such as --prefix b-"
        )


def keys_of(sidecar: Sidecar) -> list[str]:
    """Return the planned keys of a shard, quarantined ones included, in order."""
    keys = [entry.key for entry in sidecar.samples]
    for entry in sidecar.quarantine:
        keys.insert(entry.position, entry.key)
    return keys


def _write(sources: Sequence[Source], out: DatasetDir, copy: bool) -> Manifest:
    out.shards.mkdir()
    name, manifests, shards = sources[0].manifest.name, list[Manifest](), 0
    digest, samples, prompts = sha256(), 0, set[str]()
    for source in sources:
        names = (shard_name(name, index) for index in count(shards))
        written, sidecars = _keep(source, out, names, copy) if source.stays else _repack(source, out, names)
        for sidecar in sidecars:
            keys = keys_of(sidecar)
            digest.update("".join(f"{key}\n" for key in keys).encode())
            prompts.update(map(prompt_id, keys))
            samples, shards = samples + len(keys), shards + 1
        manifests += [_with_prefix(written, source.prefix)] if sidecars else []
    plan = PlanTotals(
        len(prompts), samples, shards, max(item.plan.samples_per_shard for item in manifests), digest.hexdigest()
    )
    content = _manifest(manifests, plan)
    write_atomically(out.manifest, content.to_json())
    write_index(out)
    write_quarantine(out)
    sync_directory(out.shards)
    return content


def _keep(source: Source, out: DatasetDir, names: Iterator[str], copy: bool) -> tuple[Manifest, list[Sidecar]]:
    """Link or copy the shards of a source under new names; with a prefix, write them again."""
    sidecars: list[Sidecar] = []
    for old, new in zip(source.names, names, strict=False):
        sidecar = source.directory.read_sidecar(old)
        if source.prefix:
            samples = write_tar(source.directory, sidecar.samples, out, new, source.prefix)
        else:
            samples = sidecar.samples
            check_size(source.directory, old, sidecar.end)
            _link(source.directory.tar(old), out.tar(new), copy)
        lost = tuple(replace(entry, key=f"{source.prefix}{entry.key}") for entry in sidecar.quarantine)
        sidecars.append(replace(sidecar, shard=new, index=shard_index(new), samples=samples, quarantine=lost))
        write_atomically(out.sidecar(new), sidecars[-1].to_json())
    return source.manifest, sidecars


def _link(source: Path, target: Path, copy: bool) -> None:
    if not copy:
        try:
            os.link(source, target)
            return
        except OSError:  # another file system, or one without hard links
            target.unlink(missing_ok=True)
    shutil.copyfile(source, target)
    with open(target, "rb") as stream:
        os.fsync(stream.fileno())


def _repack(source: Source, out: DatasetDir, names: Iterator[str]) -> tuple[Manifest, list[Sidecar]]:
    """Write the samples of a source that are not left out to new shards; quarantined samples are left out."""
    parts, seen = assign(source.entries(), lambda entry: entry.key in source.left_out)
    kept, selection = parts.get(False, {}), {"where": None, "best": None, "by": None}
    content = selected_manifest(source.directory, source.manifest, selection, kept, seen)
    entries, per_shard = selected_entries(source.directory, kept), content.plan.samples_per_shard
    return content, [
        write_shard(source.directory, islice(entries, per_shard), out, name, "merge", source.prefix)
        for name in islice(names, content.plan.shards)
    ]


def _with_prefix(manifest: Manifest, prefix: str) -> Manifest:
    """Return the manifest of a source whose keys got a prefix; its identity, which samples record, stays."""
    if not prefix:
        return manifest
    output = {**manifest.job.get("output", {}), "key_prefix": f"{prefix}{manifest.key_prefix}"}
    return replace(manifest, job={**manifest.job, "output": output})


def _manifest(sources: Sequence[Manifest], plan: PlanTotals) -> Manifest:
    """Return the manifest of the merged dataset, with the job and settings of its first source."""
    first = sources[0]
    identity = {
        **{name: first.identity[name] for name in SETTINGS if name in first.identity},
        "name": first.name,
        "output": {"format": first.setting("job.output.format", str)},
        "merged": [{"fingerprint": source.fingerprint, "key_prefix": source.key_prefix} for source in sources],
        "keys_sha256": plan.keys_sha256,
    }
    own = fingerprint(identity)
    return Manifest(
        own, first.job, plan, identity, licence=first.licence, versions=first.versions, sources=tuple(sources)
    )
