"""Share what one process has computed from a large file with the other processes of a node.

Locks and answers lie in the node's temporary folder, not on a shared file system. Where that cannot be used, every
process reads the file itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from io import BufferedReader
from pathlib import Path

from filelock import FileLock, Timeout

from madgen.utils.atomic import write_atomically

MIN_BYTES = 16 * 2**20
"""Smaller files are read quickly."""
SETTLED_S = 60.0
"""A file that changed more recently is always read: over NFS its times may not show another change."""
MAX_WAIT_S = 600.0
"""Longest wait for another process, which may be suspended."""
CHUNK = 16 * 2**20
"""Bytes: file servers are quickest with long reads in order, which mapping a file does not give."""
NETWORK = set("nfs nfs4 lustre gpfs beegfs ceph cifs smb3 9p virtiofs afs wekafs panfs orangefs dvs".split())
"""File systems, as the kernel calls them; those in user space are taken for such too."""


def once(file: Path, name: str, compute: Callable[[BufferedReader], str]) -> str:
    """Return `compute(stream)` of a file, computed by one process of this node until the file changes.

    name: of the quantity, such as `sha256`
    """
    with open(file, "rb") as stream:
        status = os.fstat(stream.fileno())
        if status.st_size < MIN_BYTES or time.time() - max(status.st_ctime, status.st_mtime) < SETTLED_S:
            return compute(stream)
        identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        key = f"{socket.gethostname()} {name} {identity}"  # several machines may share a temporary folder
        lock = None
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError, Timeout):
                path = _private_folder() / hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
                lock = stack.enter_context(FileLock(f"{path}.lock", timeout=MAX_WAIT_S))
                if path.exists():
                    return path.read_text(encoding="utf-8")
            value = compute(stream)
            if lock is not None:
                with contextlib.suppress(OSError):  # a full disk: the next process computes it again
                    write_atomically(path, value.encode())
            return value


def _private_folder() -> Path:
    """Return a temporary folder that no other user can write to, as its content is trusted; OSError otherwise."""
    folder = Path(tempfile.gettempdir()) / f"madgen-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise PermissionError(f"{folder} is open to other users")
    return folder


def fetch_ahead(files: Iterable[Path]) -> None:
    """Files of a shared file system are read into this node's memory, by one of the processes started together.

    What cannot be read is told by whoever loads it.
    """
    for file in files:
        with contextlib.suppress(OSError):
            if is_shared(file):
                once(file, f"read by {started_together()}", lambda stream: str(_read(stream)))


def _read(stream: BufferedReader) -> int:
    size, buffer = 0, bytearray(CHUNK)
    while count := stream.readinto(buffer):
        size += count
    return size


def started_together(variables: Mapping[str, str] = os.environ) -> str:
    """The same in all processes of one `srun`, `torchrun` or command, and in no others of this machine."""
    if "SLURM_STEP_ID" in variables:
        names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
        return "slurm " + " ".join(variables.get(name, "") for name in names)
    if "TORCHELASTIC_RUN_ID" in variables:
        return f"torchrun {variables['TORCHELASTIC_RUN_ID']} {variables.get('MASTER_PORT', '')} {os.getppid()}"
    group, started = os.getpgid(0), ""
    with contextlib.suppress(OSError, IndexError):
        started = Path(f"/proc/{group}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    return f"group {group} {started}"


def is_shared(file: Path, mounts: bytes | None = None) -> bool:
    """Whether a file lies on a network file system; `mounts`: the content of /proc/self/mountinfo."""
    if mounts is None:
        try:
            mounts = Path("/proc/self/mountinfo").read_bytes()
        except OSError:
            return False
    path, point, kind = os.fsencode(os.path.realpath(file)), b"", ""
    for line in mounts.split(b"\n"):
        before, _, after = line.partition(b" - ")
        fields = before.split(b" ")
        if len(fields) < 5:
            continue
        here = re.sub(rb"\\([0-7]{3})", lambda code: bytes([int(code[1], 8)]), fields[4])
        if (path == here or path.startswith(here.rstrip(b"/") + b"/")) and len(here) >= len(point):
            point, kind = here, after.split(b" ")[0].decode()
    return kind in NETWORK or kind == "fuse" or kind.startswith("fuse.")
