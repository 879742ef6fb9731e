"""Locate and read the files in a dataset's directory."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from madgen.dataset.format import FormatError, Manifest, Record, SampleEntry, ShardSummary, Sidecar
from madgen.dataset.records import read_file
from madgen.utils.atomic import file_system_time, is_abandoned, owner_of
from madgen.utils.errors import UserError

SHARD_NAME = re.compile(r"[A-Za-z0-9_-]+-\d{6,}")
"""Stem of a shard's files; others in the folder, such as copies and hidden files, are ignored."""
R = TypeVar("R", bound=Record)
GONE = "the dataset has disappeared"


@dataclass(frozen=True)
class DatasetDir:
    """The directory of a dataset."""

    root: Path

    @property
    def manifest(self) -> Path:
        """Path of the manifest with the job and its identity."""
        return self.root / "dataset.json"

    @property
    def shards(self) -> Path:
        """Folder of the finished shards and their sidecars."""
        return self.root / "shards"

    @property
    def work(self) -> Path:
        """Folder of claims, heartbeats and open shards; removed when the dataset is complete."""
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

    @property
    def plans(self) -> Path:
        """Folder of cached prompt tables, for workers that start later."""
        return self.work / "plan"

    def tar(self, shard: str) -> Path:
        return self.shards / f"{shard}.tar"

    def sidecar(self, shard: str) -> Path:
        """Return the path of the sidecar, which commits the shard when it appears."""
        return self.shards / f"{shard}.json"

    def committed(self) -> set[str]:
        """Return the names of the shards that have a sidecar."""
        return self._stems(".json")

    def done(self) -> set[str]:
        """Return the names of the finished shards: those with a sidecar and a tar."""
        return self._stems(".tar") & self.committed()

    def is_done(self, shard: str) -> bool:
        """Return whether `shard in done()`, without listing the folder."""
        return self.sidecar(shard).exists() and self.tar(shard).exists()

    def _stems(self, suffix: str) -> set[str]:
        try:
            names = {entry.name for entry in os.scandir(self.shards) if entry.name.endswith(suffix)}
            return {stem for name in names if SHARD_NAME.fullmatch(stem := name.removesuffix(suffix))}
        except FileNotFoundError:
            return set()
        except NotADirectoryError:
            raise FormatError(f"{self.shards} is not a directory; move it away, then generate again") from None

    def check_there(self) -> None:
        """Raise OSError (ESTALE) if the dataset has disappeared, e.g. with its file system."""
        try:
            os.stat(self.manifest)
        except (FileNotFoundError, NotADirectoryError):
            raise OSError(errno.ESTALE, GONE, str(self.root)) from None

    def make_in_work(self, folder: Path) -> None:
        """Create a folder in `work/`, but nothing below a lost mount: OSError (ESTALE) if the dataset is gone."""
        if folder.is_dir():
            return
        try:
            root = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        except (FileNotFoundError, NotADirectoryError):
            self.check_there()
            raise
        try:  # relative to the open folder, in case the path is replaced meanwhile
            if self.manifest.name not in os.listdir(root):
                raise OSError(errno.ESTALE, GONE, str(self.root))
            for path in (self.work, folder):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(path.relative_to(self.root), dir_fd=root)
        finally:
            os.close(root)

    def check_kinds(self, shards: Container[str]) -> None:
        """Raise UserError for a directory, pipe or broken link in place of a file, or a file in place of a folder.

        `shards`: the planned ones. Links to files and folders are accepted. Nothing is opened.
        """
        for folder in (self.shards, self.work, self.root / "samples"):
            if os.path.lexists(folder) and not os.path.isdir(folder):
                raise UserError(f"{folder} is not a directory; move it away, then generate again")
        for path in (self.root / name for name in ("index.parquet", "README.md", "quarantine.jsonl")):
            if os.path.lexists(path) and not os.path.isfile(path):
                raise UserError(f"{path} {_kind(path)}; move it away, then generate again")
        for path in self._shard_files_of_other_kinds():
            if path.stem in shards:
                fix = f"run madgen verify {self.root} --repair, then generate again to remake its shard"
                raise UserError(f"{path} {_kind(path)}; {fix}")

    def _shard_files_of_other_kinds(self) -> Iterator[Path]:
        """Yield the paths of tars and sidecars that are no files, except links that a new tar replaces."""
        try:
            entries = {entry.name: entry for entry in os.scandir(self.shards)}
        except FileNotFoundError:
            return
        for name, entry in sorted(entries.items()):
            path = self.shards / name
            if path.suffix not in (".tar", ".json") or os.path.isfile(path):
                continue
            if f"{path.stem}.json" in entries or not entry.is_symlink():
                yield path

    @contextlib.contextmanager
    def reporting_disappearance(self, began: Callable[[], bool] = lambda: True) -> Iterator[None]:
        """Raise OSError (ESTALE) instead of an error about a missing file if the whole dataset has disappeared.

        `began` returns whether the dataset existed before.
        """
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, UserError):
            if began():
                self.check_there()
            raise

    def read_manifest(self) -> Manifest:
        """Read `dataset.json`. Raises UserError if it is missing or damaged."""
        try:
            return Manifest.from_json(read_file(self.manifest), self.manifest)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{self.root} holds no madgen dataset (no dataset.json); name the output.dir of a job"
            ) from None
        except OSError as error:
            raise UserError(f"cannot read {self.manifest}: {error}") from error
        except FormatError as error:
            raise FormatError(
                f"{error}; restore it from a copy, or rerun the job that generated its shards to write it again"
            ) from error

    def sweep(self, owner: str | None = None) -> None:
        """Remove the temporary files of killed workers, or those of the process `owner` (see `owner_tag`)."""
        with contextlib.suppress(OSError):  # a read-only dataset
            now = file_system_time(self.root)
            for path in [*self.root.glob(".*"), *self.root.glob("samples/.*"), *self.shards.glob(".*")]:
                with contextlib.suppress(OSError):
                    if is_abandoned(path, now) if owner is None else owner_of(path) == owner:
                        path.unlink()

    def finished(self) -> list[str]:
        """Return the names of the finished shards of the dataset, in order, without files that are not planned."""
        done = self.done()
        with contextlib.suppress(UserError):  # of an unreadable `dataset.json`: all may belong to it
            done &= set(self.read_manifest().shard_names())
        return sorted(done)

    def sidecars(self) -> Iterator[Sidecar]:
        """Yield the sidecars of the finished shards, in order."""
        for name in self.finished():
            with contextlib.suppress(FileNotFoundError):  # reopened in the meantime
                yield self.read_sidecar(name)

    def entries(self) -> Iterator[SampleEntry]:
        """Yield the samples of the finished shards, in order."""
        for sidecar in self.sidecars():
            yield from sidecar.samples

    def evenly_spaced(self, counts: Sequence[tuple[str, int]], limit: int) -> Iterator[SampleEntry]:
        """Yield at most `limit` samples from all over the dataset; `counts` are (shard, number of samples)."""
        total, begin = sum(count for _, count in counts), 0
        number = min(limit, total)
        wanted = [(2 * index + 1) * total // (2 * number) for index in range(number)]
        for shard, count in counts:
            here = [index - begin for index in wanted if begin <= index < begin + count]
            samples = self.read_sidecar(shard).samples if here else ()
            yield from (samples[index] for index in here)
            begin += count

    def read_sidecar(self, name: str) -> Sidecar:
        """Read the sidecar of a shard. Raises FormatError if it is damaged."""
        return self._read_sidecar(name, Sidecar)

    def read_summary(self, name: str) -> ShardSummary:
        """Read the shard-level fields of a sidecar. Raises FormatError if it is damaged."""
        return self._read_sidecar(name, ShardSummary)

    def _read_sidecar(self, name: str, record: type[R]) -> R:
        try:
            return record.from_json(read_file(self.sidecar(name)), self.sidecar(name))
        except FormatError as error:
            fix = f"run madgen verify {self.root} --repair, then generate again to remake its shard"
            raise FormatError(f"{error}; {fix}") from error


def _kind(path: Path) -> str:
    return "is a link that leads to no file" if path.is_symlink() else "is not a regular file"
