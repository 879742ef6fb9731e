"""Names and places inside a dataset's directory, and the atomic write that everything under a final name uses."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from madgen.errors import UserError


@dataclass(frozen=True)
class DatasetDir:
    """Where things lie in one dataset."""

    root: Path

    @property
    def manifest(self) -> Path:
        """What was asked."""
        return self.root / "dataset.json"

    @property
    def shards(self) -> Path:
        """Finished shards and their sidecars."""
        return self.root / "shards"

    @property
    def work(self) -> Path:
        """Claims, heartbeats and open shards; removed when the dataset is complete."""
        return self.root / "work"

    @property
    def claims(self) -> Path:
        return self.work / "claims"

    @property
    def workers(self) -> Path:
        return self.work / "workers"

    @property
    def open_shards(self) -> Path:
        return self.work / "open"

    def tar(self, shard: str) -> Path:
        return self.shards / f"{shard}.tar"

    def sidecar(self, shard: str) -> Path:
        """The commit mark: a shard is done when it exists."""
        return self.shards / f"{shard}.json"

    def committed(self) -> set[str]:
        """Names of the shards that have a sidecar."""
        return self._stems(".json")

    def done(self) -> set[str]:
        """Names of the finished shards: a sidecar whose tar somebody has removed is work to be done again."""
        return self._stems(".tar") & self.committed()

    def is_done(self, shard: str) -> bool:
        """`shard in done()`, by two looks at the disk instead of a listing."""
        return self.sidecar(shard).exists() and self.tar(shard).exists()

    def _stems(self, suffix: str) -> set[str]:
        try:
            return {entry.name.removesuffix(suffix) for entry in os.scandir(self.shards) if entry.name.endswith(suffix)}
        except FileNotFoundError:
            return set()

    def read_manifest(self) -> dict[str, Any]:
        """`dataset.json`; UserError if this is no dataset."""
        try:
            content = json.loads(self.manifest.read_text())
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{self.root} holds no madgen dataset (no dataset.json); name the output.dir of a job"
            ) from None
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {self.manifest}: {error}") from error
        if not isinstance(content, dict) or not content.keys() >= {"job", "plan"}:
            raise UserError(f"{self.manifest} is not madgen's: it has no job and no plan; restore it from a copy")
        return content

    def sidecars(self) -> Iterator[dict[str, Any]]:
        """The sidecars of the finished shards, in order."""
        for name in sorted(self.done()):
            yield self.read_sidecar(name)

    def read_sidecar(self, name: str) -> dict[str, Any]:
        """The sidecar of a shard; UserError with the way out if it is damaged."""
        path = self.sidecar(name)
        try:
            content = json.loads(path.read_text())
        except ValueError:
            content = None
        if not isinstance(content, dict) or "samples" not in content:
            raise UserError(f"{path} is damaged; remove it and run generate again, which makes its shard again")
        return content


def write_atomically(path: Path, data: bytes) -> None:
    """A file under its final name is complete: written aside, flushed to disk, renamed."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        with open(temporary, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Makes a rename in `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_json(value: Any, indent: int | None = None) -> bytes:
    """UTF-8 JSON with sorted keys: the same value gives the same bytes."""
    return (json.dumps(value, sort_keys=True, ensure_ascii=False, indent=indent) + "\n").encode()
