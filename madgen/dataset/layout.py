"""Names and places inside a dataset's directory, and the atomic write that everything under a final name uses."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from madgen.utils.atomic import is_left_over
from madgen.utils.errors import UserError

SHARD_NAME = re.compile(r"[A-Za-z0-9_-]+-\d{6,}")
"""What else lies in the folder, copies and hidden files, is not ours."""
GONE = "the dataset has disappeared"


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

    @property
    def plans(self) -> Path:
        """Long prompt lists that were read before, for the workers that come later."""
        return self.work / "plan"

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
            names = {entry.name for entry in os.scandir(self.shards) if entry.name.endswith(suffix)}
            return {stem for name in names if SHARD_NAME.fullmatch(stem := name.removesuffix(suffix))}
        except FileNotFoundError:
            return set()

    def check_there(self) -> None:
        """OSError if the dataset has disappeared, as when its file system is gone."""
        try:
            os.stat(self.manifest)
        except (FileNotFoundError, NotADirectoryError):
            raise OSError(errno.ESTALE, GONE, str(self.root)) from None

    def make_in_work(self, folder: Path) -> None:
        """A folder of `work/`; OSError (ESTALE) if the dataset is gone: nothing is written below a lost mount."""
        if folder.is_dir():
            return
        try:
            root = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        except (FileNotFoundError, NotADirectoryError):
            self.check_there()
            raise
        try:  # all in the folder that is open, whatever comes to stand in its place
            if self.manifest.name not in os.listdir(root):
                raise OSError(errno.ESTALE, GONE, str(self.root))
            for path in (self.work, folder):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(path.relative_to(self.root), dir_fd=root)
        finally:
            os.close(root)

    @contextlib.contextmanager
    def disappearance_is_told(self, began: Callable[[], bool] = lambda: True) -> Iterator[None]:
        """Within it a file that is missing because the whole dataset is, is told as that: OSError (ESTALE).

        `began` says whether the dataset was there before.
        """
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, UserError):
            if began():
                self.check_there()
            raise

    def read_manifest(self) -> dict[str, Any]:
        """`dataset.json`; UserError if this is no dataset."""
        try:
            content = json.loads(self.manifest.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{self.root} holds no madgen dataset (no dataset.json); name the output.dir of a job"
            ) from None
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {self.manifest}: {error}") from error
        if not isinstance(content, dict) or not content.keys() >= {"job", "plan"}:
            raise UserError(f"{self.manifest} is not madgen's: it has no job and no plan; restore it from a copy")
        return content

    def sweep(self) -> None:
        """Removes what killed workers left of files that they were writing."""
        for path in [*self.root.glob(".*"), *self.root.glob("samples/.*"), *self.shards.glob(".*")]:
            with contextlib.suppress(OSError):
                if is_left_over(path):
                    path.unlink()

    def sidecars(self) -> Iterator[dict[str, Any]]:
        """The sidecars of the finished shards, in order."""
        for name in sorted(self.done()):
            with contextlib.suppress(FileNotFoundError):  # put back on the list in the meantime
                yield self.read_sidecar(name)

    def read_sidecar(self, name: str) -> dict[str, Any]:
        """The sidecar of a shard; UserError with the way out if it is damaged."""
        try:
            content = json.loads(self.sidecar(name).read_text(encoding="utf-8"))
        except ValueError:
            content = None
        if not isinstance(content, dict) or "samples" not in content:
            raise self.damaged(name)
        return content

    def damaged(self, name: str) -> UserError:
        """What is said of a sidecar that cannot be used, with the way out."""
        mend = f"madgen verify {self.root} --repair, then generate again, makes its shard again"
        return UserError(f"{self.sidecar(name)} is damaged; {mend}")


def to_json(value: Any, indent: int | None = None) -> bytes:
    """UTF-8 JSON with sorted keys: the same value gives the same bytes."""
    return (json.dumps(value, sort_keys=True, ensure_ascii=False, indent=indent) + "\n").encode()
