import errno
import os
import socket
import time

import pytest

from madgen import UserError
from madgen.utils.atomic import (
    atomic,
    boot_id,
    file_system_time,
    hard_link,
    is_abandoned,
    owner_tag,
    temporary_path,
    write_atomically,
)
from madgen.utils.errors import STORAGE_ERRORS


def test_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "a"
    with atomic(path) as stream:
        stream.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "a"
    write_atomically(path, b"old")
    with pytest.raises(ZeroDivisionError), atomic(path) as stream:
        stream.write(b"half")
        stream.write(b"%d" % (1 // 0))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_concurrent_writers_do_not_mix(tmp_path):
    path = tmp_path / "a"
    with atomic(path) as first:
        first.write(b"first")
        with atomic(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"


def test_a_removed_temporary_file_is_an_error_of_storage(tmp_path):
    with (
        pytest.raises(OSError, match="another process has removed its temporary file") as error,
        atomic(tmp_path / "a"),
    ):
        next(tmp_path.glob(".a.*")).unlink()
    assert error.value.errno in STORAGE_ERRORS


@pytest.mark.parametrize("skew_s", [-1e6, 0, 1e6])
def test_a_file_of_another_machine_is_abandoned_after_a_day_by_the_file_server(tmp_path, monkeypatch, skew_s):
    monkeypatch.setattr("time.time", lambda clock=time.time: clock() + skew_s)
    now = file_system_time(tmp_path)
    for host, boot, pid in (("elsewhere", boot_id(), 1), (socket.gethostname(), "another container", 2**22 - 1)):
        path = tmp_path / f".a.{owner_tag(host, boot, pid)}00000000"
        path.touch()
        assert not is_abandoned(path, now)
        os.utime(path, (now - 23 * 3600, now - 23 * 3600))
        assert not is_abandoned(path, now)
        os.utime(path, (now - 25 * 3600, now - 25 * 3600))
        assert is_abandoned(path, now)


def test_a_file_of_a_dead_process_of_this_machine_is_abandoned_at_once(tmp_path):
    dead = tmp_path / f".a.{owner_tag(socket.gethostname(), boot_id(), 2**22 - 1)}00000000"
    dead.touch()
    assert is_abandoned(dead, file_system_time(tmp_path))
    alive = temporary_path(tmp_path / "a")
    alive.touch()
    os.utime(alive, (0, 0))
    assert not is_abandoned(alive, file_system_time(tmp_path))


@pytest.mark.parametrize(
    "number", [errno.EPERM, errno.EACCES, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EMLINK]
)
def test_missing_hard_links_are_named_and_nothing_is_left(refused, job_file, monkeypatch, number):
    def refuse(*names, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    error = refused("generate", job_file, "output.dir=deep/below/out")
    assert f"this file system makes no hard links ({os.strerror(number)})" in error


def test_a_full_disk_is_no_lack_of_hard_links(tmp_path, monkeypatch):
    def refuse(*names):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(OSError, match="No space left") as error:
        hard_link(tmp_path / "a", tmp_path / "b")
    assert not isinstance(error.value, UserError)
