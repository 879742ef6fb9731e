"""A dataset's files to a remote folder: each shard's tar, then its sidecar, which is the commit mark there too.

What is there already, whole, is not sent again, and the listing of the remote is all that is remembered of it. The rest
follows when all shards are there: `dataset.json`, the index, the card with its pictures, what is in quarantine.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from madgen.dataset.card import PICTURE_FILES
from madgen.dataset.format import FormatError, Manifest
from madgen.dataset.index import write_index
from madgen.dataset.layout import DatasetDir
from madgen.dataset.remote.filesystem import Remote, check_at_hand, told
from madgen.dataset.shards.journal import span_sha256
from madgen.utils.errors import UserError

ATTEMPTS, FIRST_S, LONGEST_S = 9, 0.5, 30.0
"""Of one file: waits double from the first to the longest, a minute and a half in all."""
HOPELESS = (PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError)
"""Not allowed, no such bucket, no name of one: not tried so often."""
NO_KEYS = ("NoCredentialsError", "PartialCredentialsError")
"""Errors of a store's client, which is not imported here."""
SHARDS_GIVEN_UP = 3
"""After so many in a row nothing more is tried."""

Result = TypeVar("Result")
Listing = Mapping[str, dict[str, Any]]


class UnsentError(Exception):
    """What could not be sent, and why, for people."""


@dataclass
class Pushed:
    """What became of a push."""

    sent: int = 0
    """Files."""
    sent_bytes: int = 0
    there: int = 0
    """Files that were there already."""
    verified: Counter[str] = field(default_factory=Counter)
    """Files that were sent, by what showed that they have arrived whole."""
    shards_left: int = 0
    """Planned shards that are not there."""
    complete: bool = False
    """All of a complete dataset is there."""
    trouble: str | None = None
    """Why not."""


class Push:
    """Sends files of one dataset; what is sent is counted in `pushed`."""

    def __init__(
        self, directory: DatasetDir, remote: Remote, stopping: threading.Event | None = None, attempts: int = ATTEMPTS
    ):
        self.directory, self.remote, self.attempts = directory, remote, attempts
        self.stopping = stopping or threading.Event()
        self.pushed = Pushed()

    def listing(self) -> Listing:
        """What the remote holds."""
        return self.tried(self.remote.url, self.remote.listing)

    def shard(self, name: str, listing: Listing | None = None) -> None:
        """The tar, then the sidecar; `listing` is what was there a while ago. UnsentError if it cannot be done."""
        tar, sidecar = f"shards/{name}.tar", f"shards/{name}.json"
        if self._is_committed(tar, sidecar, listing):
            self.pushed.there += 2
            return
        self._refuse_damaged(name)
        self.tried(tar, lambda: self._send(tar, mark=sidecar))
        self.tried(sidecar, lambda: self._send(sidecar))

    def _refuse_damaged(self, name: str) -> None:
        """UserError if the tar is not what its sidecar says: nothing broken is handed over as whole."""
        sidecar = self.directory.read_sidecar(name)
        with open(self.directory.tar(name), "rb") as stream:
            for entry in sidecar.samples:
                try:
                    whole = span_sha256(stream, entry.offset, entry.size) == entry.sha256
                except OSError:
                    whole = False
                if not whole:
                    again = f"madgen verify {self.directory.root} --repair has it made again"
                    raise UserError(f"{self.directory.tar(name)}: sample {entry.key} is damaged; {again}")

    def _is_committed(self, tar: str, sidecar: str, listing: Listing | None) -> bool:
        """As far as its commit mark says; the tar was checked before that was sent."""
        if listing is not None and not {tar, sidecar} <= listing.keys():
            return False

        def look() -> bool:
            infos = listing if listing is not None else {name: self.remote.info(name) for name in (tar, sidecar)}
            size = (infos[tar] or {}).get("size")
            path = self.directory.root / sidecar
            there = size == (self.directory.root / tar).stat().st_size
            return there and self.remote.same(path, sidecar, infos[sidecar]) is not None

        return self.tried(sidecar, look)

    def file(self, name: str, listing: Listing) -> None:
        """Any other file; one that is not here (any more) is removed there."""
        if (self.directory.root / name).exists():
            self.tried(name, lambda: self._send(name))
        elif name in listing:
            self.tried(name, lambda: self.remote.remove(name))

    def _send(self, name: str, mark: str | None = None) -> None:
        path = self.directory.root / name
        if self.remote.same(path, name, self.remote.info(name)):
            self.pushed.there += 1
            return
        if mark is not None and self.remote.info(mark) is not None:
            self.remote.remove(mark)  # of what was there before: it must not vouch for this one
        self.remote.put(path, name)
        how = self.remote.same(path, name, self.remote.info(name))
        if how is None:
            raise OSError(f"{name} has not arrived as it was sent")
        self.pushed.sent += 1
        self.pushed.sent_bytes += path.stat().st_size
        self.pushed.verified[how] += 1

    def tried(self, what: str, call: Callable[[], Result]) -> Result:
        """Tries again and again, with longer and longer waits."""
        attempts = self.attempts
        for attempt in range(self.attempts):
            try:
                return call()
            except Exception as error:  # each file system has errors of its own
                attempts = min(attempts, 2) if is_hopeless(error) else attempts
                wait = min(LONGEST_S, FIRST_S * 2**attempt) * random.uniform(0.5, 1.0)
                if attempt + 1 >= attempts or self.stopping.wait(wait):
                    raise UnsentError(f"{what}: {told(error)}") from error
        raise AssertionError("at least one attempt")


def is_hopeless(error: BaseException) -> bool:
    """Whether it will not go away by itself."""
    return isinstance(error, HOPELESS) or type(error).__name__ in NO_KEYS


def push(
    directory: DatasetDir,
    url: str,
    on_shard: Callable[[int, int, int], None] = lambda done, shards, sent_bytes: None,
    name: str = "URL",
) -> Pushed:
    """Sends what is not there yet; UserError if that is another dataset's place, or can be no place at all."""
    manifest = directory.read_manifest()
    sender = Push(directory, open_remote(name, url))
    pushed = sender.pushed
    shards, planned = sorted(directory.done()), manifest.plan.shards
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
    """UserError if there is no such file system, or it can be told at once that it cannot be used."""
    check_at_hand(name, url)
    try:
        return Remote(url)
    except Exception as error:
        raise UserError(f"{name}={url} cannot be used: {told(error)}") from error


def refuse_other(sender: Push, listing: Listing, manifest: Manifest, name: str) -> None:
    """UserError if the place holds another dataset, or shards that are not of this one."""
    url = sender.remote.url
    if "dataset.json" in listing:
        data = sender.tried("dataset.json", lambda: sender.remote.read("dataset.json"))
        try:
            existing = Manifest.from_json(data, f"{url}/dataset.json")
        except FormatError as error:
            raise UserError(f"{name}={url} is in use: {error}; choose another place") from error
        if not _is_same(existing, manifest):
            raise UserError(f"{name}={url} holds another dataset ({existing.fingerprint}); choose another place")
    ours = {f"shards/{shard}.{suffix}" for shard in manifest.shard_names() for suffix in ("tar", "json")}
    others = sorted(
        file for file in listing if file.startswith("shards/") and file not in ours and not _is_left_over(file)
    )
    if others:
        raise UserError(f"{name}={url} holds {others[0]}, which is not of this dataset; choose another place")


def _is_same(existing: Manifest, manifest: Manifest) -> bool:
    if manifest.fingerprint is None:
        return existing.plan.keys_sha256 == manifest.plan.keys_sha256
    return existing.fingerprint == manifest.fingerprint


def _is_left_over(name: str) -> bool:
    """Of a process that was killed while it wrote there."""
    folder, _, last = name.rpartition("/")
    return folder in ("", "shards", "samples") and last.startswith(".") and last.endswith(".part")


def _shards(sender: Push, names: list[str], listing: Listing, on_shard: Callable[[int, int, int], None]) -> int:
    """Sends the shards; how many of them are not there in the end."""
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
    old = {name for name in listing if _is_left_over(name)}  # nothing else there is anybody's to remove
    for name in ("dataset.json", "index.parquet", "README.md", *PICTURE_FILES, *sorted(old), "quarantine.jsonl"):
        sender.file(name, listing)
