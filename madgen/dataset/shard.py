"""One shard on its way to disk: an open tar in `work/`, then a tar and its sidecar under their final names."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tarfile
import time
from pathlib import Path
from typing import Any

import webdataset

from madgen.dataset.encode import encode_record
from madgen.dataset.layout import DatasetDir, sync_directory, to_json, write_atomically
from madgen.types import Record, Shard, Task


class OpenShard:
    """Collects the records of one shard, in the order of its tasks, then publishes it."""

    def __init__(self, directory: DatasetDir, shard: Shard, worker: str, image_format: str, quality: int):
        self.directory, self.shard, self.worker = directory, shard, worker
        self.image_format, self.quality = image_format, quality
        self.path = directory.open_shards / f"{shard.name}.{worker}.tar"
        self.written: list[Task] = []
        self.seconds: dict[str, float] = {}
        self.started = time.time()
        directory.open_shards.mkdir(parents=True, exist_ok=True)
        self.stream = open(self.path, "wb")  # noqa: SIM115 -- closed by publish or discard
        self.tar = webdataset.TarWriter(
            self.stream, encoder=False, mtime=0, user="madgen", group="madgen", format="PAX_FORMAT"
        )

    def add(self, record: Record) -> None:
        """Encodes and appends one panorama."""
        expected = self.shard.tasks[len(self.written)].key
        if record.task.key != expected:
            raise ValueError(f"{self.shard.name}: expected sample {expected}, got {record.task.key}")
        self.tar.write(encode_record(record, self.image_format, self.quality))
        self.written.append(record.task)

    def add_seconds(self, timings: dict[str, float]) -> None:
        """Sums up where the time went; recorded in the sidecar."""
        for name, seconds in timings.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def publish(self) -> bool:
        """The tar by rename, then the sidecar: after a crash between the two the shard counts as not done.

        False if another worker took over in the meantime, because this one stood still for longer than its lease.
        """
        if len(self.written) != len(self.shard.tasks):
            raise ValueError(f"{self.shard.name}: {len(self.written)} of {len(self.shard.tasks)} samples written")
        self.tar.close()
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.stream.close()
        if self.directory.is_done(self.shard.name) or not self.path.exists():
            self.discard()
            return False
        samples = self._describe()
        self.directory.shards.mkdir(parents=True, exist_ok=True)
        os.replace(self.path, self.directory.tar(self.shard.name))
        sync_directory(self.directory.shards)
        sidecar = {
            "shard": self.shard.name,
            "index": self.shard.index,
            "samples": samples,
            "quarantined": [],
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "started": self.started,
            "finished": time.time(),
            "worker": self.worker,
        }
        write_atomically(self.directory.sidecar(self.shard.name), to_json(sidecar))
        return True

    def _describe(self) -> list[dict[str, Any]]:
        """The sidecar's entries, read back from the tar that is about to be published."""
        spans = sample_spans(self.path)
        if [key for key, _, _ in spans] != [task.key for task in self.written]:
            raise OSError(f"{self.path} does not read back as it was written")
        with open(self.path, "rb") as stream:
            return [
                {
                    "key": task.key,
                    "offset": offset,
                    "size": size,
                    "sha256": span_sha256(stream, offset, size),
                    "seed": task.seed,
                    "prompt": task.prompt.text,
                    "height": task.prompt.height,
                    "width": task.prompt.width,
                }
                for task, (_, offset, size) in zip(self.written, spans, strict=True)
            ]

    def discard(self) -> None:
        """Gives the shard up; nothing stays on disk."""
        for part in (self.tar, self.stream):
            with contextlib.suppress(
                OSError, ValueError
            ):  # what is buffered need not be written, nor can on a full disk
                part.close()
        self.path.unlink(missing_ok=True)


def sample_spans(path: Path) -> list[tuple[str, int, int]]:
    """Per sample (key, offset, size) in bytes: its tar records, headers and padding included."""
    spans: list[tuple[str, int, int]] = []
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            key = member.name.partition(".")[0]
            end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            if spans and spans[-1][0] == key:
                spans[-1] = (key, spans[-1][1], end - spans[-1][1])
            else:
                spans.append((key, member.offset, end - member.offset))
    return spans


def span_sha256(stream: Any, offset: int, size: int) -> str:
    """sha256 of `size` bytes of an open file at `offset`."""
    stream.seek(offset)
    digest = hashlib.sha256()
    while size > 0:
        chunk = stream.read(min(size, 1 << 20))
        if not chunk:
            raise OSError(f"the file ends {size} bytes early")
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest()
