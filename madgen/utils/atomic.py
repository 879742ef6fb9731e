"""A file under its final name is complete: written aside, flushed to disk, renamed."""

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

LEFT_OVER_S = 60.0
"""A temporary file of another machine that nobody has written to for so long belongs to nobody."""


def temporary_path(path: Path) -> Path:
    """Where a file is written before it has its name: its own in all processes of all machines."""
    return path.with_name(f".{path.name}.{_host()}{os.getpid():08x}{secrets.token_hex(4)}")


def is_left_over(path: Path) -> bool:
    """Whether `path` is of the kind of `temporary_path`, and its process has been killed."""
    found = re.fullmatch(r"\..+\.([0-9a-f]{6})([0-9a-f]{8})[0-9a-f]{8}", path.name)
    if found is None:
        return False
    if found[1] == _host():
        return not psutil.pid_exists(int(found[2], 16))
    return time.time() - path.stat().st_mtime > LEFT_OVER_S


def _host() -> str:
    """This machine in six letters."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A stream whose content stands under `path` when the block ends, whole; nothing is left if it fails."""
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
            error.filename = str(path)  # what was asked for
        raise
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_atomically(path: Path, data: bytes) -> None:
    """As `atomic`, of bytes that are at hand."""
    with atomic(path) as stream:
        stream.write(data)


def check_new_directory(target: Path) -> None:
    """UserError unless a directory can appear at `target` by rename: nothing is there, or an empty directory."""
    if not target.parent.is_dir():
        raise UserError(f"-o {target}: the folder {target.parent} does not exist")
    if target.exists() and (not target.is_dir() or any(os.scandir(target))):
        raise UserError(f"-o {target} is {'not empty' if target.is_dir() else 'a file'}; choose another directory")


def publish_directory(temporary: Path, target: Path) -> None:
    """Renames a directory that is whole; UserError if something has come to stand at `target` meanwhile."""
    try:
        os.rename(temporary, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise UserError(f"-o {target} is not empty any more; choose another directory") from error
    sync_directory(target.parent)


def sync_directory(directory: Path) -> None:
    """Makes a rename in `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems have no such thing
            raise
    finally:
        os.close(descriptor)
