"""Write a shard: an open tar and its journal in `work/`, published as a tar and its sidecar."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from madgen.dataset.checks.tar import read_samples, tar_size
from madgen.dataset.format import Environment, QuarantineEntry, SampleEntry, Sidecar
from madgen.dataset.layout import DatasetDir
from madgen.dataset.shards.journal import Piece, Quarantined, Settled, read_records
from madgen.dataset.shards.recovery import Salvage
from madgen.types import Shard
from madgen.utils.atomic import sync_directory, write_atomically


class OpenShard:
    """Collect the samples of one shard, in the order of its tasks, then publish it.

    Recovered samples are copied at their position, because a stalled worker may still be writing to the old files.
    """

    def __init__(self, directory: DatasetDir, shard: Shard, worker: str, salvage: Salvage | None = None):
        self.directory, self.shard, self.worker = directory, shard, worker
        self.fingerprint = directory.read_manifest().shard_fingerprint(shard.index)
        salvage = salvage or Salvage()
        self.kept, self.sources = dict(salvage.kept), list(salvage.sources)
        self.settled: list[Settled] = []
        self.made = 0
        self.seconds: dict[str, float] = {}
        self.view_evaluations = 0
        self.environment: Environment | None = None
        self.started = time.time()
        directory.make_in_work(directory.open_shards)
        self.path = directory.open_shards / f"{shard.name}.{secrets.token_hex(6)}.tar"
        self.journal = self.path.with_suffix(".jsonl")
        self._tar = open(self.path, "xb")  # noqa: SIM115 -- closed by publish, leave or discard
        self._log = open(self.journal, "xb")  # noqa: SIM115
        self._size, self._lines = 0, b""
        try:
            self._copy_kept()
        except BaseException:  # e.g. a full disk; the recovered samples are still in the old files
            self._close()
            self._remove(self.path, self.journal)
            raise

    @property
    def complete(self) -> bool:
        """Return whether every task is sampled or quarantined."""
        return len(self.settled) == len(self.shard.tasks)

    def add(self, position: int, sample: bytes, scores: dict[str, float] | None = None) -> None:
        """Append the bytes of `encode_sample` for the task at `position`, with the `scores` of its JSON."""
        key = self._expect(position)
        self._append(Piece(key, 0, len(sample), hashlib.sha256(sample).hexdigest(), scores), sample)
        self.made += 1
        self._copy_kept()

    def quarantine(self, position: int, reason: str, detail: str) -> None:
        """Quarantine the sample of the task at `position`."""
        self._settle(Quarantined(self._expect(position), reason, detail))
        self._copy_kept()

    def commit(self, seconds: dict[str, float] | None = None, view_evaluations: int = 0) -> None:
        """Write the journal, after which the added samples survive a kill.

        `seconds` by activity and `view_evaluations` are added to the totals of the shard.
        """
        self._tar.flush()
        self._log.write(self._lines)
        self._log.flush()
        self._lines = b""
        self.view_evaluations += view_evaluations
        for name, value in (seconds or {}).items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value
        if self.sources and not self.kept:
            for stream in (self._tar, self._log):  # a machine failure must not lose both copies
                os.fsync(stream.fileno())
            sync_directory(self.directory.open_shards)
            self._remove(*self.sources)
            self.sources = []

    def _expect(self, position: int) -> str:
        """Return the key of the task at `position`. Raises ValueError unless it comes next."""
        if position != len(self.settled):
            raise ValueError(f"{self.shard.name}: sample {len(self.settled)} comes next, got {position}")
        return self.shard.tasks[position].key

    def _copy_kept(self) -> None:
        while (settled := self.kept.pop(len(self.settled), None)) is not None:
            if isinstance(settled, Quarantined):
                self._settle(settled)
            else:
                self._append(settled, self._read_kept(settled))

    def _read_kept(self, piece: Piece) -> bytes:
        """Read a recovered sample. Raises OSError (ESTALE) if it has changed because its worker has resumed."""
        records = None
        with contextlib.suppress(FileNotFoundError), open(piece.tar, "rb") as source:
            records = read_records(source, piece)
        if records is None:
            raise OSError(errno.ESTALE, "salvaged samples have changed", str(piece.tar))
        return records

    def _append(self, piece: Piece, records: bytes) -> None:
        self._tar.write(records)
        self._settle(replace(piece, tar=self.path, offset=self._size))
        self._size += piece.size

    def _settle(self, settled: Settled) -> None:
        self._lines += settled.to_json()
        self.settled.append(settled)

    def publish(self, owned: Callable[[], bool] = lambda: True) -> bool:
        """Publish the tar by rename, then the sidecar, which commits the shard.

        If killed in between, the journal allows to recover the tar. Returns False if another worker has taken over
        because this one stalled for longer than its lease; `owned` is called just before the rename.
        """
        if not self.complete:
            raise ValueError(f"{self.shard.name}: {len(self.settled)} of {len(self.shard.tasks)} samples settled")
        self.commit()
        self._tar.write(bytes(tar_size(self._size) - self._size))
        self._tar.flush()
        os.fsync(self._tar.fileno())
        inode = os.fstat(self._tar.fileno()).st_ino
        self._close()
        if not self._move(owned):
            self.discard()
            return False
        write_atomically(self.directory.sidecar(self.shard.name), self._sidecar().to_json())
        if os.stat(self.directory.tar(self.shard.name)).st_ino != inode:
            # Another worker has replaced the tar, so the sidecar does not match it: regenerate the shard.
            self.directory.sidecar(self.shard.name).unlink(missing_ok=True)
        self.discard()
        return True

    def _move(self, owned: Callable[[], bool]) -> bool:
        tar, sidecar = self.directory.tar(self.shard.name), self.directory.sidecar(self.shard.name)
        try:
            self._check_what_was_written()
            if not owned() or self.directory.is_done(self.shard.name):
                return False
            sidecar.unlink(missing_ok=True)  # of a removed tar; it must not commit this one
            os.replace(self.path, tar)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE) or self.path.exists():
                raise
            return False  # removed by the worker that took over
        sync_directory(self.directory.shards)
        return True

    def _check_what_was_written(self) -> None:
        """Read the tar back, and check the keys, the places and the checksums of its samples. Raises OSError."""
        pieces = [settled for settled in self.settled if isinstance(settled, Piece)]
        samples: list[tuple[str, int, int, str]] | None = None
        with contextlib.suppress(tarfile.TarError), open(self.path, "rb") as stream:
            samples = [(each.key, each.offset, each.size, each.digest.hexdigest()) for each in read_samples(stream)]
        if samples != [(piece.key, piece.offset, piece.size, piece.sha256) for piece in pieces]:
            raise OSError(errno.EIO, f"{self.path} does not read back as it was written")

    def _sidecar(self) -> Sidecar:
        samples, quarantine = list[SampleEntry](), list[QuarantineEntry]()
        for position, (task, settled) in enumerate(zip(self.shard.tasks, self.settled, strict=True)):
            prompt = task.prompt
            if isinstance(settled, Quarantined):
                entry = QuarantineEntry(task.key, task.seed, prompt.text, position, settled.reason, settled.detail)
                quarantine.append(entry)
                continue
            span, size = (settled.offset, settled.size, settled.sha256), (prompt.height, prompt.width)
            kept = dict(prompt.columns) or None
            samples.append(SampleEntry(task.key, task.seed, prompt.text, *span, *size, settled.scores, columns=kept))
        return Sidecar(
            self.shard.name,
            self.shard.index,
            tuple(samples),
            tuple(quarantine),
            seconds={name: round(value, 3) for name, value in self.seconds.items()},
            view_evaluations=self.view_evaluations,
            made=self.made,
            started=self.started,
            finished=time.time(),
            worker=self.worker,
            fingerprint=self.fingerprint,
            environment=self.environment,
        )

    def leave(self) -> None:
        """Close the shard unfinished; the next worker that claims it recovers the intact samples."""
        self._close()
        if not self.settled:
            self._remove(self.path, self.journal)

    def discard(self) -> None:
        """Remove the files of the open shard and those that it was recovered from."""
        self._close()
        self._remove(self.path, self.journal, *self.sources)

    def _close(self) -> None:
        for stream in (self._tar, self._log):
            with contextlib.suppress(OSError, ValueError):  # flushing fails on a full disk
                stream.close()

    def _remove(self, *paths: Path) -> None:
        for path in paths:
            path.unlink(missing_ok=True)
