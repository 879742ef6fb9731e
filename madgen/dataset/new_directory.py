"""Write datasets that are derived from others to a temporary directory, and publish them by rename."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from madgen.utils.atomic import (
    check_new_directory,
    file_system_time,
    is_abandoned,
    publish_directory,
    temporary_path,
)


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Yield a directory that is renamed to `target` when the block ends; if the block fails, nothing is left of it.

    Raises UserError if `target` exists and is not empty.
    """
    check_new_directory(target)
    target = target.resolve()  # `.` has no name, and a link is no directory to rename over
    _remove_abandoned(target.parent)
    temporary = temporary_path(target)
    try:
        temporary.mkdir()
        yield temporary
        publish_directory(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _remove_abandoned(folder: Path) -> None:
    with contextlib.suppress(OSError):
        now = file_system_time(folder)
        for path in folder.glob(".*"):
            with contextlib.suppress(OSError):
                holds_shards = any(any(path.glob(pattern)) for pattern in ("shards/", "*/shards/"))
                if holds_shards and not path.is_symlink() and is_abandoned(path, now):
                    shutil.rmtree(path)
