"""Disks in trouble, for `faults.py`.

`run` mounts a disk in a namespace, runs workers of a dataset on it one after the other, and copies what they made. Exit
status 1 with a line where a worker ends with another status than it should.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults_worker import work


class Bench:
    """A folder to mount something on, in which the workers' dataset is."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.disk = folder, folder / "mounts" / name
        self.dataset = self.disk / name
        self.disk.mkdir(parents=True)

    def start(self, prepare: Callable[[], None] = lambda: None, lease_s: float = 60.0) -> int:
        """A worker's process id; `prepare` is called in it first."""
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                prepare()
                work(self.folder, self.dataset, None, lease_s)
            except SystemExit as stopped:
                code = int(stopped.code or 0)
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        return pid

    @property
    def sampled(self) -> Path:
        """Where workers log what they sample."""
        return self.folder / f"{self.dataset.name}.sampled"

    def expect(self, status: int, when: str, pid: int | None = None) -> None:
        """Waits for a worker, by default a new one, to end with this status."""
        self.must_be(status, self.end_of(pid or self.start()), when)

    def end_of(self, pid: int) -> int:
        """Waits for a worker; its exit status."""
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def must_be(self, expected: int, status: int, when: str) -> None:
        """Ends with what the worker has said, if it is another status."""
        if status != expected:
            log = self.folder / f"{self.dataset.name}.log"
            sys.exit(f"{when}: exit {status}, expected {expected}\n{log.read_text(encoding='utf-8')[-3000:]}")


def mount(*arguments: object) -> None:
    """As on the command line."""
    subprocess.run(["mount", *map(str, arguments)], check=True)


def full(bench: Bench) -> None:
    """The disk is too small, and later larger."""
    mount("-t", "tmpfs", "-o", "size=300k", "madgen", bench.disk)
    bench.expect(3, "a full disk")
    bench.expect(3, "a disk that is still full")
    mount("-o", "remount,size=64m", bench.disk)
    bench.expect(0, "with space again")


def read_only(bench: Bench) -> None:
    """Nothing can be written, and later it can."""
    mount("-t", "tmpfs", "-o", "ro", "madgen", bench.disk)
    bench.expect(2, "a read-only disk")
    mount("-o", "remount,rw", bench.disk)
    bench.expect(0, "once it can be written")


def mount_real(bench: Bench) -> Path:
    """A folder that is the disk, as a server's is."""
    real = bench.disk.with_name(f"{bench.disk.name}-real")
    real.mkdir(exist_ok=True)
    mount("--bind", real, bench.disk)
    return real


def lost(bench: Bench) -> None:
    """It is taken away below a worker, and comes back."""
    real, first = mount_real(bench), bench.dataset / "shards/job-000000.json"

    def linger() -> None:
        """After the first shard, wait until the disk is gone."""
        from madgen import PanoramaSampler

        sample = PanoramaSampler.sample_latents

        def late(*arguments: Any, **options: Any) -> Any:
            while first.exists():
                time.sleep(0.01)
            return sample(*arguments, **options)

        PanoramaSampler.sample_latents = late  # type: ignore[method-assign]

    pid = bench.start(linger)
    while not first.exists():
        if (ended := os.waitpid(pid, os.WNOHANG))[0]:
            sys.exit(f"exit {os.waitstatus_to_exitcode(ended[1])} of a worker whose disk is there")
        time.sleep(0.01)
    subprocess.run(["umount", "-l", bench.disk], check=True)
    bench.expect(3, "a file system that is gone", pid)
    if list(bench.disk.iterdir()):
        sys.exit("wrote below the mount point")
    mount("--bind", real, bench.disk)
    bench.expect(0, "with the file system back")


DERIVED = {"index.parquet", "README.md", "samples"}
"""Made of finished shards when all are there; what was begun may be ended where the disk was."""
CALLS = set("open os.listdir os.scandir os.mkdir os.rename os.link os.remove os.rmdir".split())
MNT_DETACH = 2


@dataclass
class Vanishing:
    """Takes the disk away in the process that calls `install`, before a call of a kind that was not met yet.

    Kinds are told apart by what is done in which folder to which sort of file, from the first finished shard on.
    """

    disk: Path
    met: set[str]
    log: Path
    """A line for each kind."""
    on: bool = False

    def install(self) -> None:
        """For as long as the process lives."""
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in CALLS or not (paths := [str(path) for path in arguments if str(self.disk) in str(path)]):
            return
        last = Path(paths[-1])
        sort = last.suffix if last.suffix in (".tar", ".json", ".jsonl") else ""  # others have a name of their own
        kind = f"{event} {last.parent.name}/*{sort}"
        if self.on and kind not in self.met:
            self.on = False
            with open(self.log, "a", encoding="utf-8") as log:
                log.write(f"{kind}\n")
            if ctypes.CDLL(None).umount2(os.fsencode(self.disk), MNT_DETACH):
                os._exit(99)
        elif event == "os.rename" and last.parent.name == "shards" and last.suffix == ".json":
            self.on = True


def vanishing(bench: Bench) -> None:
    """It is taken away before a call of each kind, and comes back for the next worker, until no kind is left.

    The dataset is all of the disk, so that its folder is still there then, and empty.
    """
    bench.dataset = bench.disk
    log, made, results = bench.folder / f"{bench.dataset.name}.met", bench.sampled, set()
    real = mount_real(bench)
    while True:
        fresh = not (bench.dataset / "dataset.json").exists()
        met = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        status = bench.end_of(bench.start(Vanishing(bench.disk, set(met), log).install, lease_s=2.0))
        mounted = bench.disk.samefile(real)
        if not mounted and {path.name for path in bench.disk.iterdir()} - DERIVED:
            sys.exit(f"wrote below the mount point, after {met[-1]}")
        if mounted:
            bench.must_be(0, status, "a run that went to its end")
            results.add(tuple(sorted((tar.name, tar.read_bytes()) for tar in bench.dataset.glob("shards/*.tar"))))
            if fresh:
                break  # no call was of a new kind
            for path in bench.dataset.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            made.unlink()
        else:
            finished = (real / "README.md").exists()  # only tidying up was left
            bench.must_be(
                0 if finished and status == 0 else 3,
                status,
                f"gone before {log.read_text(encoding='utf-8').splitlines()[-1]}",
            )
            mount("--bind", real, bench.disk)
    if len(results) != 1 or len(met) < 15:
        sys.exit(f"{len(results)} different datasets after {len(met)} disappearances")


SCENARIOS = {
    "full": ("a disk that fills up", full, 2),
    "read-only": ("a disk that is read-only", read_only, 1),
    "lost": ("a file system that disappears", lost, 1),
    "vanishing": ("the same, before a call of each kind", vanishing, 1),
}
"""What each is called, what it does, and how often a worker is stopped."""

CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000


def run(disk: str, folder: Path, root: Path) -> None:
    """Run a scenario in a mount namespace, and copy its dataset to `root`; the process's stderr goes to `root`.err."""
    os.dup2(os.open(root.with_suffix(".err"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    user, group = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS | CLONE_NEWUSER):
        raise OSError(ctypes.get_errno(), "unshare")
    Path("/proc/self/setgroups").write_text("deny", encoding="utf-8")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1", encoding="utf-8")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1", encoding="utf-8")
    mount("--make-rprivate", "/")
    bench = Bench(folder, root.name)
    SCENARIOS[disk][1](bench)
    shutil.copytree(bench.dataset, root)
