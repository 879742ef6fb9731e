"""Upload a dataset to a remote folder: each shard's tar, then its sidecar, which commits the shard there as well.

Files that are intact on the remote are not uploaded again; the only state is the remote's listing. Once all shards are
uploaded, the other files follow: `dataset.json`, the index, the card with its images, and the quarantine list.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from madgen.dataset.card import PICTURE_FILES
from madgen.dataset.checks.tar import check_size
from madgen.dataset.foreign_shards import refuse_foreign_shards
from madgen.dataset.format import FormatError, Manifest
from madgen.dataset.index import write_index
from madgen.dataset.layout import DatasetDir
from madgen.dataset.reader import damaged_sample
from madgen.dataset.records import open_file
from madgen.dataset.remote.filesystem import Remote, describe_error
from madgen.dataset.shards.journal import is_whole
from madgen.utils.errors import UserError
from madgen.utils.filesystems import check_client_installed

ATTEMPTS, FIRST_S, LONGEST_S = 9, 0.5, 30.0
"""Attempts per file; the wait in seconds doubles from the first to the longest, about 1.5 minutes in total."""
HOPELESS = (PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError)
"""Permanent errors, such as a missing bucket or permission: retried once only."""
NO_KEYS = ("NoCredentialsError", "PartialCredentialsError")
"""Names of errors of the S3 client, which is not imported here."""
SHARDS_GIVEN_UP = 3
"""Consecutive failed shards after which a push stops."""

Result = TypeVar("Result")
Listing = Mapping[str, dict[str, Any]]


class UnsentError(Exception):
    """A file could not be uploaded; the message names the file and the reason."""


@dataclass
class Pushed:
    """The result of a push."""

    sent: int = 0
    """Uploaded files."""
    sent_bytes: int = 0
    there: int = 0
    """Files that were already on the remote."""
    verified: Counter[str] = field(default_factory=Counter)
    """Uploaded files by the method that verified them, such as `MD5`."""
    shards_left: int = 0
    """Planned shards that are missing on the remote."""
    complete: bool = False
    """True once the complete dataset is on the remote."""
    trouble: str | None = None
    """The reason why the push is incomplete."""


class Push:
    """Upload files of a dataset, and count them in `pushed`."""

    def __init__(
        self, directory: DatasetDir, remote: Remote, stopping: threading.Event | None = None, attempts: int = ATTEMPTS
    ):
        self.directory, self.remote, self.attempts = directory, remote, attempts
        self.stopping = stopping or threading.Event()
        self.pushed = Pushed()

    def listing(self) -> Listing:
        """Return the files on the remote."""
        return self.tried(self.remote.url, self.remote.listing)

    def shard(self, name: str, listing: Listing | None = None) -> None:
        """Upload the tar, then the sidecar, unless committed by an earlier `listing`. Raises UnsentError on failure."""
        tar, sidecar = f"shards/{name}.tar", f"shards/{name}.json"
        if self._is_committed(tar, sidecar, listing):
            self.pushed.there += 2
            return
        self._refuse_damaged(name)
        self.tried(tar, lambda: self._send(tar, mark=sidecar))
        self.tried(sidecar, lambda: self._send(sidecar))

    def _refuse_damaged(self, name: str) -> None:
        """Raise UserError if a shard is of another dataset, or one of its samples does not match its checksum."""
        refuse_foreign_shards(self.directory, self.directory.read_manifest(), [name])
        sidecar = self.directory.read_sidecar(name)
        with open_file(self.directory.tar(name)) as stream:
            for entry in sidecar.samples:
                if not is_whole(stream, entry):
                    raise damaged_sample(self.directory, entry, "checksum mismatch")
        check_size(self.directory, name, sidecar.end)

    def _is_committed(self, tar: str, sidecar: str, listing: Listing | None) -> bool:
        """Return whether the sidecar and the tar's size match. The tar was verified before its sidecar was uploaded."""
        if listing is not None and not {tar, sidecar} <= listing.keys():
            return False

        def look() -> bool:
            infos = listing if listing is not None else {name: self.remote.info(name) for name in (tar, sidecar)}
            size = (infos[tar] or {}).get("size")
            path = self.directory.root / sidecar
            same_size = size == (self.directory.root / tar).stat().st_size
            return same_size and self.remote.same(path, sidecar, infos[sidecar]) is not None

        return self.tried(sidecar, look)

    def file(self, name: str, listing: Listing) -> None:
        """Upload any other file; if it does not exist locally, remove it from the remote."""
        if (self.directory.root / name).exists():
            open_file(self.directory.root / name).close()  # refuses directories and pipes
            self.tried(name, lambda: self._send(name))
        elif name in listing:
            self.tried(name, lambda: self.remote.remove(name))

    def _send(self, name: str, mark: str | None = None) -> None:
        path = self.directory.root / name
        if self.remote.same(path, name, self.remote.info(name)):
            self.pushed.there += 1
            return
        if mark is not None and self.remote.info(mark) is not None:
            self.remote.remove(mark)  # of a previous tar; it must not commit this one
        self.remote.put(path, name)
        method = self.remote.same(path, name, self.remote.info(name))
        if method is None:
            raise OSError(f"{name} has not arrived as it was sent")
        self.pushed.sent += 1
        self.pushed.sent_bytes += path.stat().st_size
        self.pushed.verified[method] += 1

    def tried(self, what: str, call: Callable[[], Result]) -> Result:
        """Call a function with retries and exponential backoff. Raises UnsentError."""
        attempts = self.attempts
        for attempt in range(self.attempts):
            try:
                return call()
            except Exception as error:  # each file system raises different errors
                attempts = min(attempts, 2) if is_hopeless(error) else attempts
                wait = min(LONGEST_S, FIRST_S * 2**attempt) * random.uniform(0.5, 1.0)
                if attempt + 1 >= attempts or self.stopping.wait(wait):
                    raise UnsentError(f"{what}: {describe_error(error)}") from error
        raise AssertionError("at least one attempt")


def is_hopeless(error: BaseException) -> bool:
    """Return whether the error is permanent, so that retries are useless."""
    return isinstance(error, HOPELESS) or type(error).__name__ in NO_KEYS


def push(
    directory: DatasetDir,
    url: str,
    on_shard: Callable[[int, int, int], None] = lambda done, shards, sent_bytes: None,
    name: str = "URL",
) -> Pushed:
    """Upload all missing files. Raises UserError if the remote holds another dataset or cannot be used.

    Shards of another dataset are refused before anything is uploaded.
    """
    manifest = directory.read_manifest()
    refuse_foreign_shards(directory, manifest)
    sender = Push(directory, open_remote(name, url))
    pushed = sender.pushed
    shards = sorted(directory.done() & set(manifest.shard_names()))
    planned = manifest.plan.shards
    try:
        listing = sender.listing()
        refuse_other(sender, listing, manifest, name)
        failed = _shards(sender, shards, listing, on_shard)
        pushed.shards_left = planned - len(shards) + failed
        if not pushed.shards_left:
            _rest(sender, listing)
            pushed.complete = True
    except UnsentError as error:
        pushed.trouble = str(error)
    return pushed


def open_remote(name: str, url: str) -> Remote:
    """Open a remote folder. Raises UserError if its file system is unknown, not installed or fails to open."""
    check_client_installed(name, url)
    try:
        return Remote(url)
    except Exception as error:
        raise UserError(f"{name}={url} cannot be used: {describe_error(error)}") from error


def refuse_other(sender: Push, listing: Listing, manifest: Manifest, name: str) -> None:
    """Raise UserError if the remote holds another dataset or shards that are not planned."""
    url = sender.remote.url
    if "" in listing:
        raise UserError(f"{name}={url} is a file; choose a folder")
    if "dataset.json" in listing:
        data = sender.tried("dataset.json", lambda: sender.remote.read("dataset.json"))
        try:
            existing = Manifest.from_json(data, f"{url}/dataset.json")
        except FormatError as error:
            raise UserError(f"{name}={url} is in use: {error}; choose another target") from error
        if not _is_same(existing, manifest):
            raise UserError(f"{name}={url} holds another dataset ({existing.fingerprint}); choose another target")
    ours = {f"shards/{shard}.{suffix}" for shard in manifest.shard_names() for suffix in ("tar", "json")}
    others = sorted(
        file for file in listing if file.startswith("shards/") and file not in ours and not _is_left_over(file)
    )
    if others:
        raise UserError(f"{name}={url} holds {others[0]}, which is not of this dataset; choose another target")


def _is_same(existing: Manifest, manifest: Manifest) -> bool:
    if manifest.fingerprint is None:
        return existing.plan.keys_sha256 == manifest.plan.keys_sha256
    earlier = (generation.fingerprint for generation in manifest.generations or ())
    return existing.fingerprint in (manifest.fingerprint, *earlier)


def _is_left_over(name: str) -> bool:
    """Return whether a file is the temporary file of an upload that was killed."""
    folder, _, last = name.rpartition("/")
    return folder in ("", "shards", "samples") and last.startswith(".") and last.endswith(".part")


def _shards(sender: Push, names: list[str], listing: Listing, on_shard: Callable[[int, int, int], None]) -> int:
    """Upload the shards; return the number of shards that failed."""
    failed, in_a_row, trouble = 0, 0, ""
    for done, name in enumerate(names):
        try:
            sender.shard(name, listing)
            in_a_row = 0
        except UnsentError as error:
            failed, in_a_row, trouble = failed + 1, in_a_row + 1, str(error)
            if in_a_row == SHARDS_GIVEN_UP:
                failed += len(names) - done - 1
                break
        on_shard(done + 1 - failed, len(names), sender.pushed.sent_bytes)
    sender.pushed.trouble = trouble or None
    return failed


def _rest(sender: Push, listing: Listing) -> None:
    root = sender.directory.root
    if not all((root / name).exists() for name in ("index.parquet", "README.md")):
        write_index(sender.directory)
    old = {name for name in listing if _is_left_over(name)}  # no other files are removed
    for name in ("dataset.json", "index.parquet", "README.md", *PICTURE_FILES, *sorted(old), "quarantine.jsonl"):
        sender.file(name, listing)
