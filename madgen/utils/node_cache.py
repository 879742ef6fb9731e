"""What the processes of one node do once: the first reads a large file, the others wait and share what it found.

Locks and answers lie in the node's own temporary folder, not on a shared file system. Where that cannot be used, every
process reads for itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from io import BufferedReader
from pathlib import Path

LEAST = 16 * 2**20
"""Bytes: smaller files are read quickly."""
SETTLED_S = 60.0
"""A file that was changed less long ago may be changed again without its times telling, or seem unchanged over NFS."""
LONGEST_S = 600.0
"""No process waits longer for another, which may have been stopped."""
KEPT_S = 7 * 24 * 3600.0
"""Answers that nobody has asked for in so long are removed."""
CHUNK = 16 * 2**20
"""Bytes: file servers are quickest with long reads in order, which mapping a file does not give."""
NETWORK = set("nfs nfs4 lustre gpfs beegfs ceph cifs smb3 9p virtiofs afs wekafs panfs orangefs dvs".split())
"""File systems, as the kernel calls them; those in user space are taken for such too."""


def once(file: Path, question: str, answer: Callable[[BufferedReader], str]) -> str:
    """`answer(stream)` of a file that is open: asked by one process of this node, and again when it has changed."""
    with open(file, "rb") as stream:
        about = os.fstat(stream.fileno())
        if about.st_size < LEAST or time.time() - max(about.st_ctime, about.st_mtime) < SETTLED_S:
            return answer(stream)
        identity = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
        with _note(f"{_machine()} {question} {identity}") as note:
            known = b"" if note is None else os.pread(note, 4096, 0)
            if known.endswith(b"\n"):
                return known[:-1].decode()
            found = answer(stream)
            if note is not None:
                with contextlib.suppress(OSError):  # a full disk: the next one reads for itself
                    os.ftruncate(note, 0)
                    os.pwrite(note, f"{found}\n".encode(), 0)
            return found


@contextlib.contextmanager
def _note(key: str) -> Iterator[int | None]:
    """The file of an answer, locked for this process; None where there can be none, or it is held for too long."""
    try:
        path = _own_folder() / hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        note = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        yield None
        return
    try:
        held = _lock(note)
        if held:
            with contextlib.suppress(OSError):
                os.utime(note)  # it is still asked for
        yield note if held else None
    finally:
        with contextlib.suppress(OSError):
            os.close(note)  # and the lock with it


def _lock(note: int) -> bool:
    """Waits; a lock goes with its process, whatever ends that."""
    deadline = time.monotonic() + LONGEST_S
    while time.monotonic() < deadline:
        try:
            fcntl.flock(note, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.1)
        except OSError:
            break
    return False


@lru_cache
def _machine() -> str:
    """Of this boot: a temporary folder may be shared by machines, and what is in memory goes when one restarts."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} {Path('/proc/sys/kernel/random/boot_id').read_text(encoding='utf-8').strip()}"
    return socket.gethostname()


def _own_folder() -> Path:
    """Made if need be; OSError if it is not this user's alone, for what it says is believed."""
    folder = Path(tempfile.gettempdir()) / f"madgen-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    about = os.lstat(folder)
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o077:
        raise PermissionError(f"{folder} is not ours alone")
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > KEPT_S:
                path.unlink()
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
