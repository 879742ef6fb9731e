"""Write files to a temporary path, flush them to disk and rename them: a file under its final name is complete."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import psutil

from madgen.utils.errors import STORAGE_ERRORS, UserError

ABANDONED_AFTER_S = 24 * 3600.0
"""Age of the last write after which a temporary file of another machine counts as abandoned."""
OWNER = re.compile(r"\..+\.([0-9a-f]{6}[0-9a-f]{8})[0-9a-f]{8}")


def temporary_path(path: Path) -> Path:
    """Return the path to write a file to before its rename, unique among all processes of all machines."""
    owner = owner_tag(socket.gethostname(), boot_id(), os.getpid())
    return path.with_name(f".{path.name}.{owner}{secrets.token_hex(4)}")


def boot_id() -> str:
    """Return an id of the boot and PID namespace within which a PID is unambiguous; '' if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return boot + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def owner_tag(host: str, boot: str, pid: int) -> str:
    """Return the part of a temporary file's name that identifies its process: 6 hex digits of the machine, 8 of it."""
    return f"{hashlib.sha256(f'{host} {boot}'.encode()).hexdigest()[:6]}{pid:08x}"


def owner_of(path: Path) -> str | None:
    """Return the `owner_tag` in the name of a temporary file; None for other files."""
    match = OWNER.fullmatch(path.name)
    return match[1] if match else None


def is_abandoned(path: Path, now: float) -> bool:
    """Return whether `path` is a `temporary_path` whose process has died.

    Of another machine that is unknown: its file must not have been written to for a day before `now`, which is
    `file_system_time`, as the clocks of machines differ.
    """
    owner = owner_of(path)
    if owner is None:
        return False
    pid = int(owner[6:], 16)
    if owner == owner_tag(socket.gethostname(), boot_id(), pid):
        return not psutil.pid_exists(pid)
    written = max(item.lstat().st_mtime for item in (path, *path.rglob("*")))
    return now - written > ABANDONED_AFTER_S


def file_system_time(folder: Path) -> float:
    """Return the time of a folder's file server, which also dates the files in it. Raises OSError."""
    with tempfile.TemporaryFile(dir=folder) as stream:
        stream.write(b".")
        stream.flush()
        return os.fstat(stream.fileno()).st_mtime


def hard_link(source: Path, target: Path) -> None:
    """Create a hard link, which fails if `target` exists; UserError if the file system cannot."""
    try:
        os.link(source, target)
    except (FileExistsError, FileNotFoundError):
        raise
    except OSError as error:
        if error.errno in STORAGE_ERRORS - {errno.EPERM, errno.EACCES}:
            raise
        raise UserError(
            f"{target.parent}: this file system makes no hard links ({error.strerror}), by which processes share a "
            "dataset; choose an output.dir on another file system"
        ) from error


@contextmanager
def atomic(path: Path, overwrite: bool = True) -> Iterator[BinaryIO]:
    """Yield a stream whose content appears at `path` when the block ends; if the block fails, nothing changes.

    Without `overwrite`, raises FileExistsError if `path` exists, also if several processes create it at once.
    """
    temporary = temporary_path(path)
    try:
        with open(temporary, "xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        if overwrite:
            _rename(temporary, path)
        else:
            hard_link(temporary, path)
            temporary.unlink()
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (temporary, str(temporary)):
            error.filename = str(path)  # the path that the caller knows
        raise
    sync_directory(path.parent)


def _rename(temporary: Path, path: Path) -> None:
    try:
        os.replace(temporary, path)
    except FileNotFoundError:
        if temporary.parent.is_dir() and not temporary.exists():
            raise OSError(errno.ESTALE, "another process has removed its temporary file", str(path)) from None
        raise
    except IsADirectoryError:
        raise UserError(f"{path} is a directory, expected a file; move it away") from None


def remove(path: Path) -> None:
    """Remove a file, if there is one. Raises UserError for a directory."""
    try:
        path.unlink(missing_ok=True)
    except IsADirectoryError:
        raise UserError(f"{path} is a directory, expected a file; move it away") from None


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
