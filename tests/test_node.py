"""What the processes of one node do once."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from madgen import node

FORK = multiprocessing.get_context("fork")  # they differ in nothing but their number
MOUNTS = r"""22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
31 22 0:40 / /home rw - nfs4 server:/home rw
32 31 8:2 / /home/me/local\040disk rw - xfs /dev/sdb rw
33 22 0:41 / /scratch rw - lustre mgs:/scratch rw
34 22 0:42 / /mnt/s rw - fuse.sshfs me@there:/ rw
"""


@pytest.fixture(autouse=True)
def own_node(tmp_path, monkeypatch):
    monkeypatch.setattr(node.tempfile, "gettempdir", lambda: str(tmp_path))


@pytest.fixture
def file(tmp_path) -> Path:
    (tmp_path / "weights").write_bytes(os.urandom(1000))
    return tmp_path / "weights"


def asked(file: Path, log: Path, seconds: float = 0.0) -> str:
    """One process's question, logged when its answer is looked for."""

    def answer() -> str:
        with open(log, "a") as stream:
            stream.write("read\n")
        time.sleep(seconds)
        return "what it says"

    return node.once(file, "what", answer)


def test_of_processes_that_ask_together_one_reads(file, tmp_path):
    log = tmp_path / "log"
    with FORK.Pool(4) as pool:
        answers = pool.starmap(asked, [(file, log, 0.3)] * 8)
    assert answers == ["what it says"] * 8
    assert log.read_text() == "read\n"


def test_it_is_read_again_when_it_has_changed(file, tmp_path):
    log, stamp = tmp_path / "log", file.stat().st_mtime_ns
    asked(file, log)
    file.write_bytes(os.urandom(1000))
    os.utime(file, ns=(stamp, stamp))  # as a copy that keeps times
    asked(file, log)
    asked(file, log)
    assert log.read_text() == "read\n" * 2


def test_another_question_is_another_answer(file, tmp_path):
    assert node.once(file, "one", lambda: "1") == "1"
    assert node.once(file, "two", lambda: "2") == "2"
    assert node.once(file, "one", lambda: pytest.fail("is known")) == "1"


def test_whoever_waits_for_a_process_that_is_killed_reads_itself(file, tmp_path):
    log = tmp_path / "log"
    killed = FORK.Process(target=asked, args=(file, log, 60.0))
    killed.start()
    while not log.exists():
        time.sleep(0.01)
    waits = FORK.Process(target=asked, args=(file, log))
    waits.start()
    waits.join(0.3)
    assert waits.is_alive()
    os.kill(killed.pid, signal.SIGKILL)
    waits.join(20)
    assert waits.exitcode == 0
    assert log.read_text() == "read\n" * 2


def test_an_error_is_not_remembered(file):
    def breaks() -> str:
        raise OSError("away")

    with pytest.raises(OSError, match="away"):
        node.once(file, "what", breaks)
    assert node.once(file, "what", lambda: "now") == "now"


def test_a_folder_that_others_may_write_to_is_not_believed(file, tmp_path):
    own = tmp_path / f"madgen-{os.getuid()}"
    node.once(file, "what", lambda: "true")
    for answer in own.iterdir():
        answer.write_text("a lie\n")
    own.chmod(0o777)
    assert node.once(file, "what", lambda: "true") == "true"


def test_where_nothing_can_be_kept_it_is_read_each_time(file, tmp_path):
    (tmp_path / f"madgen-{os.getuid()}").write_text("a file")
    assert node.once(file, "what", lambda: "one") == "one"
    assert node.once(file, "what", lambda: "two") == "two"


def test_old_answers_are_removed(file, tmp_path):
    node.once(file, "what", lambda: "old")
    own = tmp_path / f"madgen-{os.getuid()}"
    (answer,) = own.iterdir()
    os.utime(answer, (0, 0))
    node.once(file, "another", lambda: "new")
    assert len(list(own.iterdir())) == 1
    assert not answer.exists()


def test_files_of_a_network_are_told_from_others():
    shared = {"/home/me/w": True, "/scratch/w": True, "/mnt/s/w": True, "/home/me/local disk/w": False, "/w": False}
    assert {path: node.is_shared(Path(path), MOUNTS) for path in shared} == shared


def test_processes_started_together_know_each_other():
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1"}
    assert node.started_together(step) == node.started_together({**step, "SLURM_PROCID": "3"})
    assert node.started_together(step) != node.started_together({**step, "SLURM_RESTART_COUNT": "1"})
    here = "from madgen import node; print(node.started_together({}))"
    one, two = (subprocess.run([sys.executable, "-c", here], capture_output=True, text=True).stdout for _ in range(2))
    assert one == two == f"{node.started_together({})}\n"


def test_only_what_is_shared_is_fetched_and_once(file, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(node, "_read", lambda path: read.append(path) or 1000)
    node.fetch_ahead([file])
    assert read == []
    monkeypatch.setattr(node, "is_shared", lambda path: True)
    node.fetch_ahead([file])
    node.fetch_ahead([file])
    assert read == [file]
