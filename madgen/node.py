"""What the processes of one node do once: the first reads a file, the others wait and share what it found.

Locks and answers lie in the node's own temporary folder, not on a shared file system. Where that cannot be used, every
process reads for itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

KEPT_S = 7 * 24 * 3600.0
"""Answers that nobody has asked for in so long are removed."""
CHUNK = 16 * 2**20
"""Bytes: file servers are quickest with long reads in order, which mapping a file does not give."""
NETWORK = set("nfs nfs4 lustre gpfs beegfs ceph cifs smb3 9p virtiofs afs wekafs panfs".split())
"""File systems, as the kernel calls them; those in user space are taken for such too."""


def once(file: Path, question: str, answer: Callable[[], str]) -> str:
    """`answer()` about a file: asked by one process of this node, and again when the file has changed."""
    try:
        about = os.stat(file)
        folder = _own_folder()
        key = f"{question} {about.st_dev} {about.st_ino} {about.st_size} {about.st_mtime_ns} {about.st_ctime_ns}"
        stream = open(folder / hashlib.blake2b(key.encode(), digest_size=16).hexdigest(), "a+")  # noqa: SIM115
    except OSError:
        return answer()
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX)  # gone with its process, whatever ends that
        except OSError:
            return answer()
        stream.seek(0)
        known = stream.read()
        if known.endswith("\n"):
            with contextlib.suppress(OSError):
                os.utime(stream.fileno())
            return known[:-1]
        found = answer()
        with contextlib.suppress(OSError):
            stream.truncate(0)  # what a killed process has begun
            stream.write(f"{found}\n")
        return found


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
    """Files of a shared file system are read into this node's memory, by one of the processes started together."""
    for file in files:
        if is_shared(file):
            once(file, f"read by {started_together()}", lambda file=file: str(_read(file)))  # type: ignore[misc]


def _read(file: Path) -> int:
    size, buffer = 0, bytearray(CHUNK)
    with open(file, "rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            size += count
    return size


def started_together(variables: Mapping[str, str] = os.environ) -> str:
    """The same in all processes of one `srun`, `torchrun` or command."""
    if "SLURM_JOB_ID" in variables:
        names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
        return "slurm " + " ".join(variables.get(name, "") for name in names)
    if "TORCHELASTIC_RUN_ID" in variables:
        return f"torchrun {variables['TORCHELASTIC_RUN_ID']} {variables.get('MASTER_PORT', '')} {os.getppid()}"
    return f"group {os.getpgid(0)}"


def is_shared(file: Path, mounts: str | None = None) -> bool:
    """Whether a file lies on a network file system; `mounts`: the text of /proc/self/mountinfo."""
    if mounts is None:
        try:
            mounts = Path("/proc/self/mountinfo").read_text()
        except OSError:
            return False
    path, found = os.path.realpath(file), ("", "")
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        point = before.split(" ")[4].encode().decode("unicode_escape")
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(found[0]):
            found = (point, after.split(" ")[0])
    return found[1] in NETWORK or found[1] == "fuse" or found[1].startswith("fuse.")
