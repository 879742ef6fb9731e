"""Who works on which shard: claim files with a heartbeat, on any shared POSIX file system.

A claim is made by hard link, which is atomic also over NFS, and names its worker. A worker is alive while its
heartbeat file is renewed; the ages of two heartbeats are compared on the file server's clock. A claim of a dead
worker is taken over. Two workers on one shard cost time, never data: the rename is atomic, and a sidecar stays only
with the tar that it was written for.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from madgen.dataset.format import to_json
from madgen.dataset.layout import DatasetDir

HEARTBEAT_S = 3.0
LEASE_S = 60.0


@dataclass(frozen=True)
class Process:
    """One process on one boot of one host."""

    host: str
    boot: str
    pid: int
    started: str

    @classmethod
    def this(cls) -> Process:
        return cls(socket.gethostname(), _boot_id(), os.getpid(), _start_time(os.getpid()))

    def is_surely_dead(self) -> bool:
        """True only where this machine can tell: the same host and boot, and no such process."""
        here = self.host == socket.gethostname() and self.boot == _boot_id() != ""
        return here and _start_time(self.pid) != self.started


def _boot_id() -> str:
    """Where process numbers mean the same: one boot of one machine, one PID namespace of a container; '' if unknown."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _start_time(pid: int) -> str:
    """Field 22 of /proc/PID/stat, which tells a process from a later one of the same number; '' if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in ("Z", "X") else fields[19]


class Worker:
    """This process's identity, heartbeat and claims on one dataset."""

    def __init__(self, directory: DatasetDir, heartbeat_s: float | None = None, lease_s: float | None = None):
        self.directory = directory
        self.heartbeat_s = HEARTBEAT_S if heartbeat_s is None else heartbeat_s
        self.lease_s = LEASE_S if lease_s is None else lease_s
        self.process = Process.this()
        self.id = f"{self.process.host.replace('.', '-')}-{self.process.pid}-{secrets.token_hex(3)}"
        self.claimed: set[str] = set()
        self.report: dict[str, Any] = {"state": "starting", "samples": 0, "open": {}, "rate_per_s": None}
        self.measure: Callable[[], dict[str, Any]] = dict
        """What each heartbeat finds out anew."""
        self.started = time.time()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def heartbeat_file(self) -> Path:
        return self.directory.workers / f"{self.id}.json"

    def start(self) -> None:
        """Begins to beat; claims may be made after this."""
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
        """Renews the heartbeat file, with what this worker says of itself."""
        with self._lock:
            self.report.update(report)
            content = {
                "id": self.id,
                "host": self.process.host,
                "boot": self.process.boot,
                "pid": self.process.pid,
                "process_started": self.process.started,
                "started": self.started,
                "time": time.time(),
                "claims": sorted(self.claimed),
                **self.report,
                **self.measure(),
            }
            temporary = self.heartbeat_file.with_suffix(".tmp")
            with contextlib.suppress(OSError):  # a file system that is away for a while: the next beat tries again
                self.directory.workers.mkdir(exist_ok=True)
                temporary.write_bytes(to_json(content))
                os.replace(temporary, self.heartbeat_file)

    def close(self) -> None:
        """Stops beating and gives back what was not published."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        for shard in sorted(self.claimed):
            self.release(shard)
        with contextlib.suppress(OSError):  # never in the way of the error that led here
            self.heartbeat_file.unlink(missing_ok=True)

    def claimed_by_all(self) -> set[str]:
        """Names of the shards that anybody has claimed, dead workers included."""
        try:
            entries = os.listdir(self.directory.claims)
        except FileNotFoundError:
            return set()
        return {name.removesuffix(".json") for name in entries if name.endswith(".json") and name[0] != "."}

    def claim(self, shard: str) -> bool:
        """Tries to become the only worker on a shard; takes over the claim of a dead worker."""
        return self._link(shard) or self.take_over(shard)

    def take_over(self, shard: str) -> bool:
        """As `claim`, of a shard that is known to be claimed: costs two looks if its worker lives."""
        return self._break_if_dead(shard) and self._link(shard)

    def owns(self, shard: str) -> bool:
        """Whether the claim is still this worker's."""
        claim = read_json(self._claim_file(shard))
        return claim is not None and claim["worker"] == self.id

    def _link(self, shard: str) -> bool:
        temporary = self.directory.claims / f".{shard}.{self.id}"
        self.directory.check_there()
        if self.directory.is_done(shard):
            return False
        try:
            self.directory.make_in_work(self.directory.claims)  # somebody may have removed `work/`
            temporary.write_bytes(to_json({"worker": self.id, "token": secrets.token_hex(8), "time": time.time()}))
            os.link(temporary, self._claim_file(shard))
        except FileExistsError:
            if os.stat(temporary).st_nlink != 2:  # else it is ours: over NFS an answer can be lost, and asked for again
                return False
        except FileNotFoundError:  # another worker completed the dataset and removed `work/`
            return False
        finally:
            temporary.unlink(missing_ok=True)
        if self.directory.is_done(shard):  # published while we were looking elsewhere
            self._claim_file(shard).unlink(missing_ok=True)
            return False
        self.claimed.add(shard)
        return True

    def release(self, shard: str) -> None:
        """Gives a claim back, if it is still ours."""
        self.claimed.discard(shard)
        claim = read_json(self._claim_file(shard))
        if claim and claim["worker"] == self.id:
            self._claim_file(shard).unlink(missing_ok=True)

    def _claim_file(self, shard: str) -> Path:
        return self.directory.claims / f"{shard}.json"

    def _break_if_dead(self, shard: str) -> bool:
        """Removes a dead worker's claim; False if its worker may live or another was quicker."""
        path = self._claim_file(shard)
        claim = read_json(path)
        if not path.exists():
            return True
        owner = claim["worker"] if claim else ""  # a power cut can leave a claim empty: it ages by itself
        if self.is_alive(owner, path):
            return False
        broken = path.with_name(f".{shard}.broken.{self.id}")
        try:
            os.rename(path, broken)
        except FileNotFoundError:
            return True
        taken = read_json(broken)
        if taken != claim:  # another worker broke it first, and this is its fresh claim: put it back
            with contextlib.suppress(FileExistsError):
                os.link(broken, path)
            broken.unlink(missing_ok=True)
            return False
        broken.unlink(missing_ok=True)
        return True

    def is_alive(self, worker: str, claim_file: Path) -> bool:
        """Whether a worker's heartbeat is younger than the lease, and its process not known to be dead."""
        if worker == self.id:
            return True
        heartbeat = self.directory.workers / f"{worker}.json"
        state = read_json(heartbeat)
        if state is not None:
            process = Process(state["host"], state["boot"], state["pid"], state["process_started"])
            if process.is_surely_dead():
                return False
        try:
            renewed = (heartbeat if state is not None else claim_file).stat().st_mtime
            now = self.heartbeat_file.stat().st_mtime
        except FileNotFoundError:
            return True  # it has just changed: look again later
        return now - renewed < self.lease_s

    def forget_dead_workers(self) -> None:
        """Removes the heartbeat files of dead workers that hold no claim, so that `status` shows those that matter.

        One that holds a claim stays: without it nobody could tell that its worker is dead before the claim has aged.
        """
        for path in self.directory.workers.glob("*.json"):
            if not self.is_alive(path.stem, path) and not self._holds_a_claim(path):
                path.unlink(missing_ok=True)

    def _holds_a_claim(self, heartbeat: Path) -> bool:
        state = read_json(heartbeat) or {"claims": []}
        claims = [read_json(self._claim_file(shard)) for shard in state["claims"]]
        return any(claim is not None and claim["worker"] == heartbeat.stem for claim in claims)


def read_json(path: Path) -> dict[str, Any] | None:
    """A small JSON file that others may replace or remove at any time; None if it is not there or not whole."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def remove_work(directory: DatasetDir, complete: Callable[[], bool] = lambda: True) -> None:
    """Nothing of a complete dataset is left in `work/`.

    It is put aside first and `complete` asked once more: somebody may have put shards back on the list meanwhile.
    """
    for stale in directory.root.glob(".work.*"):  # of a process that was killed here
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
