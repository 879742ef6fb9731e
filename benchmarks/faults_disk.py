"""Disks in trouble, for `faults.py`: `unshare -rm python faults_disk.py full|read-only|lost FOLDER DATASET`.

Mounts a disk, runs workers of a dataset on it one after the other, and copies what they made to DATASET. Exit status 1
with a line where a worker ends with another status than it should.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path

from faults_worker import work


class Bench:
    """A folder to mount something on, in which the workers' dataset is."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.disk = folder, folder / f"mount-{name}"
        self.dataset = self.disk / name
        self.disk.mkdir()

    def start(self) -> int:
        """A worker's process id."""
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                work(self.folder, self.dataset, None, 60.0)
            except SystemExit as stopped:
                code = int(stopped.code or 0)
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        return pid

    def expect(self, status: int, when: str, pid: int | None = None) -> None:
        """Waits for a worker, by default a new one, to end with this status."""
        found = os.waitstatus_to_exitcode(os.waitpid(pid or self.start(), 0)[1])
        if found != status:
            sys.exit(f"{when}: exit {found}, expected {status}")


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


def lost(bench: Bench) -> None:
    """It is taken away below a worker, and comes back."""
    real = bench.disk.with_name(f"{bench.disk.name}-real")
    real.mkdir()
    mount("--bind", real, bench.disk)
    pid = bench.start()
    while not (bench.dataset / "shards/job-000000.json").exists():
        time.sleep(0.01)
    subprocess.run(["umount", "-l", bench.disk], check=True)
    bench.expect(3, "a file system that is gone", pid)
    if list(bench.disk.iterdir()):
        sys.exit("wrote below the mount point")
    mount("--bind", real, bench.disk)
    bench.expect(0, "with the file system back")


SCENARIOS = {
    "full": ("a disk that fills up", full, 2),
    "read-only": ("a disk that is read-only", read_only, 1),
    "lost": ("a file system that disappears", lost, 1),
}
"""What each is called, what it does, and how often a worker is stopped."""

if __name__ == "__main__":
    import warm  # noqa: F401 -- once for all workers

    disk, folder, root = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    bench = Bench(folder, root.name)
    SCENARIOS[disk][1](bench)
    shutil.copytree(bench.dataset, root)
