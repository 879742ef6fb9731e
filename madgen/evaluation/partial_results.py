"""Store partial results: one file per column and finished shard, so that a pass can be resumed or shared by processes.

A column holds one value per sample: a metric's value, or the features of its random crop. The file name is made of the
column's protocol, the shard and the checksums of its samples, so a regenerated shard is evaluated again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from madgen.dataset.format import SampleEntry, prompt_id, to_json
from madgen.dataset.layout import DatasetDir
from madgen.metrics.crops import CroppedImage
from madgen.utils.atomic import atomic


@dataclass(frozen=True)
class Column:
    """A quantity to compute for every sample."""

    name: str
    protocol: dict[str, Any]
    """Everything that the values depend on besides the images."""
    compute: Callable[[Sequence[CroppedImage]], np.ndarray]
    """Returns [N] or [N, D] for N images."""

    @property
    def id(self) -> str:
        """Identifies the column's protocol."""
        return f"{self.name}-{digest(self.protocol)}"


def digest(value: Any) -> str:
    """Return a short hash of a JSON-serializable value."""
    return hashlib.blake2b(to_json(value), digest_size=8).hexdigest()


def save_array(path: Path, values: np.ndarray) -> None:
    """Write an array atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as stream:
        np.save(stream, values)


@dataclass(frozen=True)
class ShardPart:
    """The values of one finished shard."""

    folder: Path
    shard: str
    entries: tuple[SampleEntry, ...]
    """The samples of its sidecar, in order."""

    def file(self, column: Column) -> Path:
        """Return the path of a column's values."""
        content = digest([entry.sha256 for entry in self.entries])
        return self.folder / column.id / f"{self.shard}-{content}.npy"

    def missing(self, columns: Sequence[Column]) -> list[Column]:
        """Return the columns without values."""
        return [column for column in columns if not self.file(column).exists()]

    def write(self, column: Column, values: np.ndarray) -> None:
        """Write the values of a column, in the order of the entries."""
        save_array(self.file(column), values)


def shard_parts(directory: DatasetDir, folder: Path) -> Iterator[ShardPart]:
    """Iterate over the finished shards of a dataset, in order."""
    for sidecar in directory.sidecars():
        if sidecar.samples:
            yield ShardPart(folder, sidecar.shard, sidecar.samples)


@dataclass(frozen=True)
class Collected:
    """The values of a column for a whole dataset, sorted by prompt and key."""

    keys: list[str]
    values: np.ndarray
    """[N] or [N, D], memory-mapped."""

    def rows_by_prompt(self) -> dict[str, slice]:
        """Return the rows of each prompt."""
        rows: dict[str, slice] = {}
        for row, key in enumerate(self.keys):
            prompt = prompt_id(key)
            rows[prompt] = slice(rows[prompt].start if prompt in rows else row, row + 1)
        return rows


def collect(directory: DatasetDir, column: Column, folder: Path) -> Collected:
    """Merge the values of all finished shards, loading one shard at a time."""
    parts = list(shard_parts(directory, folder))
    keys = [entry.key for part in parts for entry in part.entries]
    order = sorted(range(len(keys)), key=lambda row: (prompt_id(keys[row]), keys[row]))
    path = folder / column.id / f"all-{digest([part.file(column).name for part in parts])}.npy"
    if not path.exists():
        _merge([part.file(column) for part in parts], order, path)
    return Collected([keys[row] for row in order], np.load(path, mmap_mode="r"))


def _merge(files: Sequence[Path], order: Sequence[int], path: Path) -> None:
    row_of = np.argsort(order)
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
