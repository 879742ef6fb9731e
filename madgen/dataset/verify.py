"""Proves planned = present, without a line of the writer's code: tars are read with `tarfile` alone."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from madgen.dataset.layout import DatasetDir
from madgen.errors import UserError

IMAGE_FORMATS = ("png", "jpg", "webp")


@dataclass
class Verdict:
    """What was found: `problems` is empty for a dataset that is as planned, as far as it goes."""

    planned: int
    present: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Every planned sample is there and whole."""
        return not self.problems and self.present == self.planned


def verify(directory: DatasetDir, on_shard: Callable[[int, int], None] = lambda done, total: None) -> Verdict:
    """Checks every tar, member, checksum and picture against sidecars and plan; `on_shard(done, total)` reports."""
    manifest = directory.read_manifest()
    plan = manifest["plan"]
    verdict = Verdict(plan["samples"])
    tars = {path.stem for path in directory.shards.glob("*.tar")}  # before the sidecars, which come after them
    names = sorted(directory.committed())
    expected = {f"{manifest['job']['name']}-{index:06d}" for index in range(plan["shards"])}
    verdict.problems += [f"{name}: a shard that was not planned" for name in sorted(set(names) - expected)]
    verdict.problems += [f"{name}.tar: not planned" for name in sorted(tars - expected)]
    keys = hashlib.sha256()
    seen: set[str] = set()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        checks = pool.map(lambda name: _check_shard(directory, name, manifest), names)
        for done, (name, (found, problems)) in enumerate(zip(names, checks, strict=True), 1):
            verdict.problems += [f"{name}: {problem}" for problem in problems]
            verdict.problems += [f"{name}: {key} is in another shard too" for key in found if key in seen]
            seen.update(found)
            verdict.present += len(found)
            keys.update("".join(f"{key}\n" for key in found).encode())
            on_shard(done, len(names))
    if verdict.present == verdict.planned and keys.hexdigest() != plan["keys_sha256"]:
        verdict.problems.append("the keys are not the planned ones")
    if not verdict.problems and verdict.present != verdict.planned and len(names) == plan["shards"]:
        verdict.problems.append(f"{verdict.present} samples in all shards, {verdict.planned} planned")
    return verdict


def _check_shard(directory: DatasetDir, name: str, manifest: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The keys found in one shard, and what is wrong with it; one sample in memory at a time."""
    found: list[str] = []
    problems: list[str] = []
    try:
        sidecar = directory.read_sidecar(name)
        entries = {entry["key"]: entry for entry in sidecar["samples"]}
        with open(directory.tar(name), "rb") as raw:
            for key, members in _samples(directory.tar(name)):
                found.append(key)
                if key in entries:
                    checks = _check_sample(key, members, entries[key]["seed"])
                    problems += [f"{key}: {problem}" for problem in [*checks, *_check_bytes(raw, entries[key])]]
    except (OSError, ValueError, KeyError, TypeError, tarfile.TarError, UserError) as error:
        return found, [*problems, f"cannot be read: {error}"]
    if list(entries) != found:
        problems.append("its sidecar and its tar do not hold the same keys in the same order")
    planned = _planned_samples(manifest["plan"], name)
    if len(found) + len(sidecar["quarantined"]) != planned:
        problems.append(f"{len(found)} samples, {planned} planned")
    return found, problems


def _planned_samples(plan: dict[str, Any], name: str) -> int:
    first = int(name.rpartition("-")[2]) * plan["samples_per_shard"]
    return max(0, min(plan["samples_per_shard"], plan["samples"] - first))


def _samples(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of a tar as WebDataset groups them: members of one key that follow each other."""
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


def _check_bytes(raw: BinaryIO, entry: dict[str, Any]) -> list[str]:
    raw.seek(entry["offset"])
    if hashlib.sha256(raw.read(entry["size"])).hexdigest() != entry["sha256"]:
        return ["its bytes do not have the sidecar's sha256"]
    return []


def _check_sample(key: str, members: dict[str, bytes], seed: int) -> list[str]:
    problems = []
    images = [extension for extension in members if extension in IMAGE_FORMATS]
    if len(images) != 1 or set(members) != {*images, "json", "txt"}:
        return [f"members {sorted(members)}, expected one image, json and txt"]
    try:
        metadata = json.loads(members["json"])
        with Image.open(io.BytesIO(members[images[0]])) as image:
            image.load()
            size = (image.height, image.width)
    except (OSError, ValueError, SyntaxError) as error:
        return [f"does not decode: {error}"]
    if size != (metadata["height"], metadata["width"]):
        problems.append(f"the picture is {size} px, its JSON says {metadata['height']}, {metadata['width']}")
    if metadata["key"] != key or metadata["seed"] != seed:
        problems.append("its JSON is that of another sample")
    if members["txt"].decode() != metadata["prompt"]:
        problems.append("its txt is not the prompt of its JSON")
    return problems
