"""Publishing of shards by workers that crash, stall or lose their claims."""

import pytest
from open_shards import SHARD, begin, is_clean, resume

from madgen.dataset.shards.writer import OpenShard


def test_worker_without_its_files_does_not_publish(directory):
    """A worker stalls for longer than its lease; another one copies its samples and removes its files."""
    slow = begin(directory, 4)
    slow.commit()
    assert resume(directory) == 0
    directory.sidecar("job-000000").rename(directory.root / "aside")  # as if the other worker were not done yet
    assert not slow.publish()
    assert is_clean(directory)


def test_sidecar_matches_only_its_own_tar(directory, whole, monkeypatch):
    """A removed tar is generated again with other bytes by a worker that dies before it writes the sidecar."""
    shard = OpenShard(directory, SHARD, "w")
    for position in range(4):
        shard.quarantine(position, "constant", "")
    shard.publish()
    directory.tar("job-000000").unlink()

    def die(*_):
        raise OSError("killed")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="killed"):
        patch.setattr("madgen.dataset.shards.writer.write_atomically", die)
        begin(directory, 4).publish()
    assert directory.tar("job-000000").read_bytes() == whole
    assert not directory.is_done("job-000000")


def test_concurrent_publishing_never_mixes_two_workers(directory, whole, monkeypatch):
    """Another worker publishes a tar of other bytes between the tar and the sidecar of this one."""
    from madgen.dataset.shards import writer as module

    late, write = begin(directory, 4), module.write_atomically

    def meanwhile(path, data):
        other = directory.root / "other"
        other.write_bytes(bytes(10240))
        other.replace(directory.tar("job-000000"))
        write(path, data)

    monkeypatch.setattr(module, "write_atomically", meanwhile)
    late.publish()
    assert not directory.is_done("job-000000")
    monkeypatch.undo()
    assert resume(directory) == 4
    assert directory.tar("job-000000").read_bytes() == whole


def test_a_worker_that_lost_its_claim_does_not_publish(directory):
    assert not begin(directory, 4).publish(owned=lambda: False)
    assert not directory.tar("job-000000").exists()
    assert is_clean(directory)


def test_a_crash_between_tar_and_sidecar_costs_nothing(directory, whole, monkeypatch):
    def crash(*_):
        raise OSError("crash")

    shard = begin(directory, 4)
    with monkeypatch.context() as patch:
        patch.setattr("madgen.dataset.shards.writer.write_atomically", crash)
        with pytest.raises(OSError, match="crash"):
            shard.publish()
    assert directory.tar("job-000000").exists()
    assert not directory.is_done("job-000000")
    assert resume(directory) == 0
    assert directory.tar("job-000000").read_bytes() == whole
    assert is_clean(directory)
