"""Share what one process has computed from a large file with the other processes of a node.

Locks and answers lie in the node's temporary folder, not on a shared file system. Where that cannot be used, every
process reads the file itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import stat
import tempfile
import time
from collections.abc import Callable
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
