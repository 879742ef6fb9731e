"""Partial results: one file a column and finished shard, so that a pass can be resumed and shared among processes.

A column is what is known of every sample: a metric's number, or the features of its random crop. Its file is named
after the column's protocol, the shard and the checksums of its samples: a shard that was made again is looked at again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from madgen.dataset.layout import DatasetDir, to_json
from madgen.metrics.crops import Picture
from madgen.utils.atomic import atomic


@dataclass(frozen=True)
class Column:
    """What is computed of every sample."""

    name: str
    protocol: dict[str, Any]
    """All that the values depend on, besides the pictures."""
    compute: Callable[[Sequence[Picture]], np.ndarray]
    """[N] or [N, D] of N pictures."""

    @property
    def id(self) -> str:
        """Tells the values of one protocol from those of another."""
        return f"{self.name}-{digest(self.protocol)}"


def digest(value: Any) -> str:
    """A short hash of what JSON can hold."""
    return hashlib.blake2b(to_json(value), digest_size=8).hexdigest()


@dataclass(frozen=True)
class ShardPart:
    """One finished shard of a dataset, and where its values lie."""

    directory: DatasetDir
    folder: Path
    shard: str
    entries: tuple[dict[str, Any], ...]
    """The samples of its sidecar, in order."""

    def file(self, column: Column) -> Path:
        """Of the values of one column."""
        content = digest([entry["sha256"] for entry in self.entries])
        return self.folder / column.id / f"{self.shard}-{content}.npy"

    def missing(self, columns: Sequence[Column]) -> list[Column]:
        """The columns that nobody has computed."""
        return [column for column in columns if not self.file(column).exists()]

    def write(self, column: Column, values: np.ndarray) -> None:
        """In the order of the entries; appears whole or not at all."""
        path = self.file(column)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as stream:
            np.save(stream, values)


def shard_parts(directory: DatasetDir, folder: Path) -> Iterator[ShardPart]:
    """The finished shards of a dataset, in order."""
    for sidecar in directory.sidecars():
        if sidecar["samples"]:
            yield ShardPart(directory, folder, sidecar["shard"], tuple(sidecar["samples"]))


def prompt_of(key: str) -> str:
    """The prompt's id in a sample's key."""
    return key.rpartition("-")[0]


@dataclass(frozen=True)
class Collected:
    """The values of a column for a whole dataset, in the order of prompts and keys."""

    keys: list[str]
    values: np.ndarray
    """[N] or [N, D], mapped from a file."""

    def of_prompts(self) -> dict[str, slice]:
        """Which rows belong to which prompt."""
        found: dict[str, slice] = {}
        for row, key in enumerate(self.keys):
            prompt = prompt_of(key)
            found[prompt] = slice(found[prompt].start if prompt in found else row, row + 1)
        return found


def collect(directory: DatasetDir, column: Column, folder: Path) -> Collected:
    """Merges the parts of all finished shards, one at a time; the order of shards and processes leaves no trace."""
    parts = list(shard_parts(directory, folder))
    places = [(prompt_of(entry["key"]), entry["key"]) for part in parts for entry in part.entries]
    order = sorted(range(len(places)), key=places.__getitem__)
    keys = [places[at][1] for at in order]
    path = folder / column.id / f"all-{digest([part.file(column).name for part in parts])}.npy"
    if not path.exists():
        _merge([part.file(column) for part in parts], order, path)
    return Collected(keys, np.load(path, mmap_mode="r"))


def _merge(files: Sequence[Path], order: Sequence[int], path: Path) -> None:
    row_of = np.empty(len(order), dtype=np.int64)
    row_of[np.asarray(order)] = np.arange(len(order))
    first = np.load(files[0], mmap_mode="r")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    merged = np.lib.format.open_memmap(temporary, "w+", dtype=first.dtype, shape=(len(order), *first.shape[1:]))
    start = 0
    for file in files:
        part = np.load(file)
        merged[row_of[start : start + len(part)]] = part
        start += len(part)
    merged.flush()
    os.replace(temporary, path)
