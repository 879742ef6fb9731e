import json
import os
import subprocess
import sys
import threading

import pytest

from madgen.dataset.layout import DatasetDir
from madgen.dataset.shards.leases import Process, Worker, remove_work
from madgen.utils.atomic import owner_tag


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "dataset.json").write_text("{}", encoding="utf-8")
    return DatasetDir(tmp_path)


@pytest.fixture
def worker(directory):
    made = []

    def start(**options):
        made.append(Worker(directory, heartbeat_s=60, **options))
        made[-1].start()
        return made[-1]

    yield start
    for each in made:
        each.close()


def age(path, seconds):
    old = path.stat().st_mtime - seconds
    os.utime(path, (old, old))


def test_one_worker_gets_a_shard(worker):
    first, second = worker(), worker()
    assert first.claim("s")
    assert not second.claim("s")
    first.release("s")
    assert second.claim("s")


def test_one_of_many_concurrent_claims_wins(worker):
    workers = [worker() for _ in range(8)]
    barrier, wins = threading.Barrier(8), []

    def race(one):
        barrier.wait()
        wins.extend(shard for shard in map(str, range(40)) if one.claim(shard))

    threads = [threading.Thread(target=race, args=(one,)) for one in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(wins) == sorted(map(str, range(40)))


def test_a_done_shard_is_not_claimed(worker, directory):
    directory.sidecar("s").write_text("{}", encoding="utf-8")
    directory.tar("s").write_text("", encoding="utf-8")
    assert not worker().claim("s")
    assert list(directory.claims.iterdir()) == []
    directory.tar("s").unlink()  # a shard that somebody has removed is work again
    assert worker().claim("s")


def test_worker_with_an_old_heartbeat_loses_its_claim(worker, directory):
    stale, fresh = worker(), worker(lease_s=30)
    stale.process = Process("another-host", "", 1, "")
    stale.beat()
    assert stale.claim("s")
    age(stale.heartbeat_file, 20)
    assert not fresh.claim("s")
    age(stale.heartbeat_file, 20)
    assert fresh.claim("s")
    stale.release("s")  # it wakes up late: the claim is no longer its own
    assert not worker().claim("s")


def test_a_dead_process_of_this_host_loses_its_claim_at_once(worker, directory):
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    gone, fresh = worker(), worker()
    gone.process = Process(gone.process.host, gone.process.boot, dead.pid, "1")
    gone.beat()
    assert gone.claim("s")
    assert fresh.claim("s")


def test_dead_worker_is_removed_when_its_claims_are_taken_over(worker, directory):
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    gone, fresh = worker(), worker()
    assert gone.claim("s")
    gone.process = Process(gone.process.host, gone.process.boot, dead.pid, "1")
    gone.beat()
    fresh.forget_dead_workers()
    assert fresh.claim("s")  # at once, and not when the claim has aged
    fresh.forget_dead_workers()
    assert not gone.heartbeat_file.exists()
    assert fresh.heartbeat_file.exists()


def test_temporary_files_of_a_dead_worker_elsewhere_are_removed_with_its_heartbeat(worker, directory):
    gone, silent, fresh = worker(lease_s=30), worker(lease_s=30), worker(lease_s=30)
    files = {}
    for one, pid in ((gone, 1), (silent, 2)):
        one.process = Process("another-host", "boot", pid, "")
        one.beat()
        files[pid] = directory.shards / f".job-000000.tar.{owner_tag('another-host', 'boot', pid)}00000000"
        files[pid].touch()
    age(gone.heartbeat_file, 40)
    fresh.forget_dead_workers()
    assert not gone.heartbeat_file.exists()
    assert not files[1].exists()
    assert files[2].exists()


def test_empty_claim_expires(worker, directory):
    one = worker(lease_s=30)
    claim = directory.claims / "s.json"
    claim.write_text("", encoding="utf-8")
    assert not one.claim("s")
    age(claim, 31)
    assert one.claim("s")


def test_claim_in_a_finished_dataset_returns_false(worker, directory):
    one = worker()
    directory.sidecar("s").write_text("{}", encoding="utf-8")
    directory.tar("s").write_text("", encoding="utf-8")
    remove_work(directory)
    assert not one.claim("s")
    assert not directory.work.exists()


def test_removed_work_folder_is_recreated(worker, directory):
    one = worker()
    remove_work(directory)
    assert one.claim("s")
    one.beat()
    assert one.heartbeat_file.exists()


def test_work_folder_of_an_incomplete_dataset_is_restored(worker, directory):
    one = worker()
    one.claim("s")
    remove_work(directory, complete=lambda: False)
    assert one.owns("s")
    assert one.heartbeat_file.exists()
    assert [path.name for path in directory.root.iterdir() if path.name.startswith(".")] == []
    remove_work(directory, complete=lambda: True)
    assert not directory.work.exists()


def test_claim_counts_if_its_reply_was_lost(worker, directory, monkeypatch):
    """Over NFS a link can be made, and the answer to the second asking be that it is there."""
    one, link = worker(), os.link

    def linked_twice(source, target):
        link(source, target)
        raise FileExistsError(target)

    monkeypatch.setattr(os, "link", linked_twice)
    assert one.claim("s")
    assert one.owns("s")


def test_missing_dataset_is_an_error(worker, directory):
    one = worker()
    (directory.root / "dataset.json").unlink()
    with pytest.raises(OSError, match="the dataset has disappeared"):
        one.claim("s")


def test_own_process_is_alive():
    assert not Process.this().is_surely_dead()
    here = Process.this()
    assert Process(here.host, here.boot, here.pid, "another start").is_surely_dead()
    assert not Process("another-host", here.boot, here.pid, "x").is_surely_dead()


def test_close_releases_claims_and_removes_the_heartbeat(worker, directory):
    one = worker()
    one.claim("s")
    assert json.loads(one.heartbeat_file.read_text(encoding="utf-8"))["id"] == one.id
    one.close()
    assert list(directory.claims.iterdir()) == []
    assert list(directory.workers.iterdir()) == []
