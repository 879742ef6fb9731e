"""Check that every planned sample exists and is intact. Reads tars with `tarfile`, independently of the writer."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import tarfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from madgen.dataset.format import PlanTotals, SampleEntry
from madgen.dataset.layout import DatasetDir
from madgen.utils.errors import UserError

IMAGE_FORMATS = ("png", "jpg", "webp")


@dataclass
class Verdict:
    """The result of a verification; `problems` is empty if all shards that exist are intact and as planned."""

    planned: int
    present: int = 0
    quarantined: int = 0
    problems: list[str] = field(default_factory=list)
    broken: dict[str, Broken] = field(default_factory=dict)
    """Planned shards with a problem, except those with a read error that may be temporary."""
    mend: str = "madgen verify --repair, then generate again"

    @property
    def complete(self) -> bool:
        """Return whether every planned sample is intact or quarantined."""
        return not self.problems and self.present + self.quarantined == self.planned


@dataclass(frozen=True)
class Broken:
    """A shard to regenerate, except for its intact samples."""

    whole: list[SampleEntry]
    """Sidecar entries of the intact samples."""
    changed: int | None
    """Modification time of the checked sidecar in ns; None if it was missing."""


@dataclass
class _Shard:
    """The result of checking one shard."""

    keys: list[str] = field(default_factory=list)
    """In the order of the plan, quarantined samples included."""
    present: int = 0
    problems: list[str] = field(default_factory=list)
    whole: list[SampleEntry] = field(default_factory=list)
    changed: int | None = None
    unread: bool = False
    """Reading failed with a system error other than a missing file; the shard itself may be intact."""


def verify(directory: DatasetDir, on_shard: Callable[[int, int], None] = lambda done, total: None) -> Verdict:
    """Check tars, checksums and images against sidecars and plan, calling `on_shard(done, total)` after each shard."""
    manifest = directory.read_manifest()
    plan = manifest.plan
    verdict = Verdict(plan.samples)
    if manifest.filtered is not None:
        verdict.mend = "remove it, then madgen filter again"
    tars = {path.stem for path in directory.shards.glob("*.tar")}  # listed before the sidecars, which are written later
    committed = directory.committed()
    expected = set(manifest.shard_names())
    names = sorted(committed & expected)
    verdict.problems += [f"{name}: a shard that was not planned" for name in sorted(committed - expected)]
    verdict.problems += [f"{name}.tar: not planned" for name in sorted(tars - expected)]
    keys = hashlib.sha256()
    seen: set[bytes] = set()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, (name, shard) in enumerate(_checked(pool, directory, names, plan), 1):
            for key, mark in zip(shard.keys, map(_mark, shard.keys), strict=True):
                shard.problems += [f"{key} is there twice"] if mark in seen else []
                seen.add(mark)
            verdict.problems += [f"{name}: {problem}" for problem in shard.problems]
            verdict.present += shard.present
            verdict.quarantined += len(shard.keys) - shard.present
            if shard.problems and not shard.unread:
                verdict.broken[name] = Broken(shard.whole, shard.changed)
            keys.update("".join(f"{key}\n" for key in shard.keys).encode())
            on_shard(done, len(names))
    settled = verdict.present + verdict.quarantined
    if settled == verdict.planned and keys.hexdigest() != plan.keys_sha256:
        verdict.problems.append("the keys are not the planned ones")
    if not verdict.problems and settled != verdict.planned and len(names) == plan.shards:
        verdict.problems.append(f"{settled} samples in all shards, {verdict.planned} planned")
    return verdict


def _checked(
    pool: ThreadPoolExecutor, directory: DatasetDir, names: list[str], plan: PlanTotals
) -> Iterator[tuple[str, _Shard]]:
    """Yield the checked shards in order, checking a few of them ahead."""
    ahead: deque[tuple[str, Future[_Shard]]] = deque()
    for name in names:
        ahead.append((name, pool.submit(_check_shard, directory, name, plan)))
        if len(ahead) > 2 * (os.cpu_count() or 1):
            first, future = ahead.popleft()
            yield first, future.result()
    for name, future in ahead:
        yield name, future.result()


def _mark(key: str) -> bytes:
    """Return a 16-byte hash of a key, to save memory for datasets of ten million samples."""
    return hashlib.blake2b(key.encode(), digest_size=16).digest()


def _check_shard(directory: DatasetDir, name: str, plan: PlanTotals) -> _Shard:
    """Read a shard from beginning to end, with one sample in memory at a time."""
    shard = _Shard(changed=sidecar_time(directory, name))
    try:
        sidecar = directory.read_sidecar(name)
        entries = {entry.key: entry for entry in sidecar.samples}
        with open(directory.tar(name), "rb") as raw:
            for key, members in _samples(directory.tar(name)):
                shard.keys.append(key)
                shard.present += 1
                if key not in entries:
                    continue
                problems = [*_check_sample(key, members, entries[key]), *_check_bytes(raw, entries[key])]
                shard.problems += [f"{key}: {problem}" for problem in problems]
                shard.whole += [] if problems else [entries[key]]
    except (OSError, ValueError, KeyError, TypeError, tarfile.TarError, UserError) as error:
        shard.problems.append(f"cannot be read: {error}")
        shard.unread = isinstance(error, OSError) and error.errno not in (None, errno.ENOENT)
        return shard
    if list(entries) != shard.keys:
        shard.problems.append("its sidecar and its tar do not hold the same keys in the same order")
    for entry in sidecar.quarantine:  # in the order of their positions
        shard.keys.insert(entry.position, entry.key)
    planned = planned_samples(plan, name)
    if len(shard.keys) != planned:
        shard.problems.append(f"{len(shard.keys)} samples, {planned} planned")
    return shard


def sidecar_time(directory: DatasetDir, name: str) -> int | None:
    """Return the modification time of a sidecar in ns; None if it is missing."""
    try:
        return directory.sidecar(name).stat().st_mtime_ns
    except OSError:
        return None


def planned_samples(plan: PlanTotals, name: str) -> int:
    """Return the planned number of samples of a shard."""
    first = int(name.rpartition("-")[2]) * plan.samples_per_shard
    return max(0, min(plan.samples_per_shard, plan.samples - first))


def _samples(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield the samples of a tar as WebDataset groups them: consecutive members with the same key."""
    current, members = "", dict[str, bytes]()
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            content = tar.extractfile(member)
            if content is None:
                raise tarfile.TarError(f"{member.name} is not a file")
            if key != current and members:
                yield current, members
                members = {}
            if extension in members:
                raise tarfile.TarError(f"{member.name} is there twice")
            current, members[extension] = key, content.read()
    if members:
        yield current, members


def _check_bytes(raw: BinaryIO, entry: SampleEntry) -> list[str]:
    raw.seek(entry.offset)
    if hashlib.sha256(raw.read(entry.size)).hexdigest() != entry.sha256:
        return ["its bytes do not have the sidecar's sha256"]
    return []


def _check_sample(key: str, members: dict[str, bytes], entry: SampleEntry) -> list[str]:
    problems = []
    images = [extension for extension in members if extension in IMAGE_FORMATS]
    if len(images) != 1 or set(members) != {*images, "json", "txt"}:
        return [f"members {sorted(members)}, expected one image, json and txt"]
    try:
        metadata = json.loads(members["json"])
        with Image.open(io.BytesIO(members[images[0]])) as image:
            image.load()
            size = (image.height, image.width)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return [f"does not decode: {error}"]
    if size != (metadata["height"], metadata["width"]):
        problems.append(f"the picture is {size} px, its JSON says {metadata['height']}, {metadata['width']}")
    if metadata["key"] != key or metadata["seed"] != entry.seed:
        problems.append("its JSON is that of another sample")
    if metadata.get("scores") != entry.scores:
        problems.append("its scores are not those of its sidecar")
    if members["txt"].decode() != metadata["prompt"]:
        problems.append("its txt is not the prompt of its JSON")
    return problems


def print_verdict(verdict: Verdict, as_json: bool) -> None:
    """Print the verdict as text, or as JSON for scripts."""
    if as_json:
        counts = {name: getattr(verdict, name) for name in ("complete", "planned", "present", "quarantined")}
        print(json.dumps({**counts, "broken": sorted(verdict.broken), "problems": verdict.problems}, indent=1))
        return
    for problem in verdict.problems:
        print(problem)
    if verdict.broken:
        print(f"to mend: {verdict.mend}")
    state = "as planned" if verdict.complete else "broken" if verdict.problems else "incomplete, nothing broken"
    quarantined = f", {verdict.quarantined} quarantined" if verdict.quarantined else ""
    print(f"{verdict.present} of {verdict.planned} panoramas present{quarantined}: {state}")


def exit_code(verdict: Verdict) -> int:
    """Return 0 if complete, 4 if complete with quarantined samples, 3 if incomplete, 1 if broken."""
    if verdict.complete:
        return 4 if verdict.quarantined else 0
    return 1 if verdict.problems else 3
