"""Write files to a temporary path, flush them to disk and rename them: a file under its final name is complete."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import psutil

from madgen.utils.errors import UserError

ABANDONED_AFTER_S = 60.0
"""Age of the last write after which a temporary file of another machine counts as abandoned."""


def temporary_path(path: Path) -> Path:
    """Return the path to write a file to before its rename, unique among all processes of all machines."""
    return path.with_name(f".{path.name}.{_host()}{os.getpid():08x}{secrets.token_hex(4)}")


def is_abandoned(path: Path) -> bool:
    """Return whether `path` is a `temporary_path` whose process has died."""
    match = re.fullmatch(r"\..+\.([0-9a-f]{6})([0-9a-f]{8})[0-9a-f]{8}", path.name)
    if match is None:
        return False
    if match[1] == _host():
        return not psutil.pid_exists(int(match[2], 16))
    return time.time() - path.stat().st_mtime > ABANDONED_AFTER_S


def _host() -> str:
    """Return a hash of the host name, of six characters."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """Yield a stream whose content appears at `path` when the block ends; if the block fails, nothing changes."""
    temporary = temporary_path(path)
    try:
        with open(temporary, "xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if error.filename == str(temporary) or error.filename == temporary:
            error.filename = str(path)  # the path that the caller knows
        raise
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` by rename."""
    with atomic(path) as stream:
        stream.write(data)


def check_new_directory(target: Path) -> None:
    """Raise UserError unless a directory can be renamed to `target`, which must be missing or empty."""
    if not target.parent.is_dir():
        raise UserError(f"-o {target}: the folder {target.parent} does not exist")
    if target.exists() and (not target.is_dir() or any(os.scandir(target))):
        raise UserError(f"-o {target} is {'not empty' if target.is_dir() else 'a file'}; choose another directory")


def publish_directory(temporary: Path, target: Path) -> None:
    """Rename a complete directory to `target`; UserError if another process has created `target` meanwhile."""
    try:
        os.rename(temporary, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise UserError(f"-o {target} is not empty any more; choose another directory") from error
    sync_directory(target.parent)


def sync_directory(directory: Path) -> None:
    """Flush a rename in `directory` to disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not supported by every file system
            raise
    finally:
        os.close(descriptor)
