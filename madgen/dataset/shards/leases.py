"""Lease shards to workers with claim files and heartbeats, on any shared POSIX file system.

A claim is created by hard link, which is atomic even over NFS, and names its worker. A worker is alive as long as it
renews its heartbeat file. The ages of heartbeats are compared by the file server's clock. If a worker dies, another
one takes over its claims. Two workers on one shard waste time but never lose data: the rename is atomic, and a sidecar
is only kept together with the tar that it was written for.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from madgen.dataset.layout import DatasetDir
from madgen.dataset.records import Finite, FormatError, Record, read_file, to_json
from madgen.utils.atomic import boot_id, hard_link, owner_tag

HEARTBEAT_S = 3.0
LEASE_S = 60.0
Content = TypeVar("Content")


@dataclass(frozen=True, slots=True)
class Process(Record):
    """Identity of a process, unique across hosts and reboots."""

    host: str
    boot: str
    pid: int
    process_started: str

    @classmethod
    def this(cls) -> Process:
        return Process(socket.gethostname(), boot_id(), os.getpid(), _start_time(os.getpid()))

    def is_surely_dead(self) -> bool:
        """Return True if this host can rule out that the process is alive: same host and boot, and no such process."""
        same_boot = self.host == socket.gethostname() and self.boot == boot_id() != ""
        return same_boot and _start_time(self.pid) != self.process_started


def _start_time(pid: int) -> str:
    """Return field 22 of /proc/PID/stat, which differs if a PID is reused; '' if there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in ("Z", "X") else fields[19]


@dataclass(frozen=True, slots=True)
class Claim(Record):
    """`work/claims/<shard>.json`."""

    worker: str
    token: str = ""
    time: float = 0.0
    """Unix time."""


@dataclass(frozen=True, slots=True)
class Heartbeat(Process):
    """`work/workers/<id>.json`: a worker's process, its claims and its progress."""

    id: str
    state: str
    samples: int
    open: dict[str, int]
    """Settled samples of each open shard."""
    claims: tuple[str, ...] = ()
    rate_per_s: Finite | None = None
    rate_error: Finite | None = None
    """Relative standard error of the rate."""
    megapixels_per_s: Finite | None = None
    memory_bytes: int | None = None
    device: str | None = None
    rank: int | None = None
    shard: str | None = None
    """Shard of the current batch."""


class Worker:
    """Identity, heartbeat and claims of this process on a dataset."""

    def __init__(self, directory: DatasetDir, heartbeat_s: float | None = None, lease_s: float | None = None):
        self.directory = directory
        self.heartbeat_s = HEARTBEAT_S if heartbeat_s is None else heartbeat_s
        self.lease_s = LEASE_S if lease_s is None else lease_s
        self.process = Process.this()
        self.id = f"{self.process.host.replace('.', '-')}-{self.process.pid}-{secrets.token_hex(3)}"
        self.claimed: set[str] = set()
        self.report: dict[str, Any] = {"state": "starting", "samples": 0, "open": {}, "rate_per_s": None}
        self.measure: Callable[[], dict[str, Any]] = dict
        """Callback that returns additional values for each heartbeat."""
        self.started = time.time()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def heartbeat_file(self) -> Path:
        return self.directory.workers / f"{self.id}.json"

    def start(self) -> None:
        """Start the heartbeat; call this before `claim`."""
        self._stop.clear()
        self.directory.make_in_work(self.directory.claims)
        self.directory.make_in_work(self.directory.workers)
        self.beat()
        self._thread = threading.Thread(target=self._beat_on, name="heartbeat", daemon=True)
        self._thread.start()

    def _beat_on(self) -> None:
        while not self._stop.wait(self.heartbeat_s):
            self.beat()

    def beat(self, **report: Any) -> None:
        """Renew the heartbeat file, with an updated report of this worker's state."""
        with self._lock:
            self.report.update(report)
            content = {
                "id": self.id,
                **self.process.as_dict(),
                "started": self.started,
                "time": time.time(),
                "claims": sorted(self.claimed),
                **self.report,
                **self.measure(),
            }
            temporary = self.heartbeat_file.with_suffix(".tmp")
            with contextlib.suppress(OSError):  # file system temporarily unavailable: retried at the next heartbeat
                self.directory.workers.mkdir(exist_ok=True)
                temporary.write_bytes(to_json(content))
                os.replace(temporary, self.heartbeat_file)

    def close(self) -> None:
        """Stop the heartbeat and release all unpublished shards."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        for shard in sorted(self.claimed):
            self.release(shard)
        with contextlib.suppress(OSError):  # must not mask the error being handled
            self.heartbeat_file.unlink(missing_ok=True)

    def claimed_by_all(self) -> set[str]:
        """Return the names of the shards claimed by any worker, dead workers included."""
        try:
            entries = os.listdir(self.directory.claims)
        except FileNotFoundError:
            return set()
        return {name.removesuffix(".json") for name in entries if name.endswith(".json") and name[0] != "."}

    def claim(self, shard: str) -> bool:
        """Try to claim a shard exclusively, taking over the claim of a dead worker; return whether it succeeded."""
        return self._link(shard) or self.take_over(shard)

    def take_over(self, shard: str) -> bool:
        """Claim a shard that is already claimed, if its worker is dead. Reads only two files if the worker is alive."""
        return self._break_if_dead(shard) and self._link(shard)

    def owns(self, shard: str) -> bool:
        """Return whether this worker still holds the claim."""
        return self._owner(shard) == self.id

    def _owner(self, shard: str) -> str | None:
        """Return the worker that a claim names; None if its file is missing or damaged."""
        claim = read_shared(Claim.from_json, self._claim_file(shard))
        return None if claim is None else claim.worker

    def _link(self, shard: str) -> bool:
        temporary = self.directory.claims / f".{shard}.{self.id}"
        self.directory.check_there()
        if self.directory.is_done(shard):
            return False
        try:
            self.directory.make_in_work(self.directory.claims)  # another worker may have removed `work/`
            temporary.write_bytes(Claim(self.id, secrets.token_hex(8), time.time()).to_json())
            hard_link(temporary, self._claim_file(shard))
        except FileExistsError:
            if os.stat(temporary).st_nlink != 2:  # else this link succeeded, and NFS retried it after a lost reply
                return False
        except FileNotFoundError:  # another worker completed the dataset and removed `work/`
            return False
        finally:
            temporary.unlink(missing_ok=True)
        if self.directory.is_done(shard):  # published in the meantime
            self._claim_file(shard).unlink(missing_ok=True)
            return False
        self.claimed.add(shard)
        return True

    def release(self, shard: str) -> None:
        """Release a claim if this worker still holds it."""
        self.claimed.discard(shard)
        if self.owns(shard):
            self._claim_file(shard).unlink(missing_ok=True)

    def _claim_file(self, shard: str) -> Path:
        return self.directory.claims / f"{shard}.json"

    def _break_if_dead(self, shard: str) -> bool:
        """Remove a claim of a dead worker; return False if the worker may be alive or another one was faster."""
        path = self._claim_file(shard)
        claim = read_shared(Claim.from_json, path)
        if not os.path.lexists(path):
            return True
        owner = claim.worker if claim else ""  # empty after a power failure: expires by the age of the claim file
        if self.is_alive(owner, path):
            return False
        broken = path.with_name(f".{shard}.broken.{self.id}")
        try:
            os.rename(path, broken)
        except FileNotFoundError:
            return True
        is_same = read_shared(Claim.from_json, broken) == claim
        if not is_same:  # a new claim of another worker that was faster: put it back
            with contextlib.suppress(FileExistsError):
                hard_link(broken, path)
        broken.unlink(missing_ok=True)
        return is_same

    def is_alive(self, worker: str, claim_file: Path) -> bool:
        """Return whether a worker's heartbeat is younger than the lease and its process is not known to be dead."""
        if worker == self.id:
            return True
        worker = worker if is_file_name(worker) else ""
        heartbeat = self.directory.workers / f"{worker}.json"
        beat = read_heartbeat(heartbeat) if worker else None
        if beat is not None and beat.is_surely_dead():
            return False
        try:
            # a heartbeat that this user may not read is renewed all the same
            renewed = (heartbeat if worker and heartbeat.exists() else claim_file).stat().st_mtime
            now = self.heartbeat_file.stat().st_mtime
        except FileNotFoundError:
            return True  # changed in the meantime: the caller retries later
        return now - renewed < self.lease_s

    def forget_dead_workers(self) -> None:
        """Remove heartbeat and temporary files of dead workers without claims, so that `status` no longer lists them.

        With a claim, the heartbeat file is kept: without it, the claim could only expire by its age.
        """
        for path in self.directory.workers.glob("*.json"):
            if self.is_alive(path.stem, path):
                continue
            beat = read_heartbeat(path)
            claims = beat.claims if beat is not None else self.claimed_by_all()
            if not any(self._owner(shard) == path.stem for shard in claims if is_file_name(shard)):
                if beat is not None:
                    self.directory.sweep(owner_tag(beat.host, beat.boot, beat.pid))
                path.unlink(missing_ok=True)


def read_shared(parse: Callable[[bytes, Path], Content], path: Path) -> Content | None:
    """Read a small file that other workers may replace or remove; return None if it is missing or damaged."""
    try:
        return parse(read_file(path), path)
    except (FileNotFoundError, FormatError):
        return None


def read_heartbeat(path: Path) -> Heartbeat | None:
    """Read a heartbeat; return None if it is missing, damaged, or of a user whose files this user may not read."""
    with contextlib.suppress(PermissionError):
        return read_shared(Heartbeat.from_json, path)
    return None


def is_file_name(name: str) -> bool:
    """Return whether a name from a file can be that of a file in one of the dataset's folders."""
    return 0 < len(name) <= 200 and "/" not in name and "\0" not in name


def remove_work(directory: DatasetDir, complete: Callable[[], bool] = lambda: True) -> None:
    """Remove `work/` of a complete dataset.

    The folder is renamed first, and restored if `complete` returns False, as shards may have been reopened meanwhile.
    """
    for stale in directory.root.glob(".work.*"):  # left by a process killed during removal
        shutil.rmtree(stale, ignore_errors=True)
    aside = directory.root / f".work.{secrets.token_hex(6)}"
    try:
        os.rename(directory.work, aside)
    except FileNotFoundError:
        return
    if not complete():
        for path in sorted(aside.rglob("*")):
            target = directory.work / path.relative_to(aside)
            if path.is_file() and not target.exists():
                directory.make_in_work(target.parent)
                os.replace(path, target)
    shutil.rmtree(aside, ignore_errors=True)
