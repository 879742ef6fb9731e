"""Values that the processes of one node compute once."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from madgen.utils import node_cache as node

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def own_node(tmp_path, monkeypatch):
    monkeypatch.setattr(node.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(node, "MIN_BYTES", 1)


@pytest.fixture
def file(tmp_path) -> Path:
    (tmp_path / "weights").write_bytes(os.urandom(1000))
    return tmp_path / "weights"


@pytest.fixture
def settled(monkeypatch):
    monkeypatch.setattr(node, "SETTLED_S", -1.0)


def ask(file: Path, log: Path, seconds: float = 0.0) -> str:
    """Ask as one process does; log each read of the file."""

    def answer(stream) -> str:
        with open(log, "a", encoding="utf-8") as lines:
            lines.write("read\n")
        time.sleep(seconds)
        return f"bytes: {len(stream.read())}"

    return node.once(file, "what", answer)


def test_one_of_several_processes_reads(file, tmp_path, settled):
    log = tmp_path / "log"
    with FORK.Pool(4) as pool:
        answers = pool.starmap(ask, [(file, log, 0.3)] * 8)
        pool.close()
        pool.join()  # `with` would send SIGTERM, which other tests may handle
    assert answers == ["bytes: 1000"] * 8
    assert log.read_text(encoding="utf-8") == "read\n"


def test_changed_file_is_read_again(file, tmp_path, settled):
    log, stamp = tmp_path / "log", file.stat()
    ask(file, log)
    while file.stat().st_ctime_ns == stamp.st_ctime_ns:  # file timestamps may be coarse
        file.write_bytes(os.urandom(1000))
        os.utime(file, ns=(stamp.st_mtime_ns, stamp.st_mtime_ns))  # as `cp -p` does
    ask(file, log)
    ask(file, log)
    assert log.read_text(encoding="utf-8") == "read\n" * 2


def test_recent_or_small_files_are_always_read(file, tmp_path, monkeypatch):
    log = tmp_path / "log"
    ask(file, log)
    ask(file, log)
    monkeypatch.setattr(node, "SETTLED_S", -1.0)
    monkeypatch.setattr(node, "MIN_BYTES", 1001)
    ask(file, log)
    assert log.read_text(encoding="utf-8") == "read\n" * 3
    assert not list(tmp_path.glob("madgen-*/*"))


def test_names_have_separate_answers(file, settled):
    assert node.once(file, "one", lambda stream: "1") == "1"
    assert node.once(file, "two", lambda stream: "2") == "2"
    assert node.once(file, "one", lambda stream: pytest.fail("is known")) == "1"


def test_waiting_process_takes_over_from_a_killed_one(file, tmp_path, settled):
    log = tmp_path / "log"
    killed = FORK.Process(target=ask, args=(file, log, 60.0))
    killed.start()
    for _ in range(6000):
        if log.exists():
            break
        time.sleep(0.01)
    assert log.exists()
    waits = FORK.Process(target=ask, args=(file, log))
    waits.start()
    waits.join(0.3)
    assert waits.is_alive()
    os.kill(killed.pid, signal.SIGKILL)
    waits.join(600)
    assert waits.exitcode == 0
    assert log.read_text(encoding="utf-8") == "read\n" * 2


def test_wait_for_a_suspended_process_is_limited(file, tmp_path, settled, monkeypatch):
    log = tmp_path / "log"
    stopped = FORK.Process(target=ask, args=(file, log, 60.0))
    stopped.start()
    while not log.exists():
        assert stopped.is_alive()
        time.sleep(0.01)
    monkeypatch.setattr(node, "MAX_WAIT_S", 0.3)
    assert ask(file, log) == "bytes: 1000"
    stopped.kill()


def test_errors_are_not_cached(file, settled):
    def breaks(stream) -> str:
        raise OSError("away")

    with pytest.raises(OSError, match="away"):
        node.once(file, "what", breaks)
    assert node.once(file, "what", lambda stream: "now") == "now"


def test_folder_that_others_can_write_to_is_not_trusted(file, tmp_path, settled):
    own = tmp_path / f"madgen-{os.getuid()}"
    node.once(file, "what", lambda stream: "true")
    for answer in own.iterdir():
        answer.write_text("a lie", encoding="utf-8")
    assert node.once(file, "what", lambda stream: "true") == "a lie"
    own.chmod(0o777)
    assert node.once(file, "what", lambda stream: "true") == "true"


def test_without_a_folder_the_file_is_always_read(file, tmp_path, settled):
    (tmp_path / f"madgen-{os.getuid()}").write_text("a file", encoding="utf-8")
    assert node.once(file, "what", lambda stream: "one") == "one"
    assert node.once(file, "what", lambda stream: "two") == "two"


def test_full_disk_is_ignored(file, settled, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(node, "write_atomically", full)
    assert node.once(file, "what", lambda stream: "one") == "one"
    assert node.once(file, "what", lambda stream: "two") == "two"
