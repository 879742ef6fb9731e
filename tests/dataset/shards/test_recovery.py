"""Recovery of open shards, and of tars without a sidecar."""

import hashlib
import json
import os

import pytest
from open_shards import PLAN, SHARD, begin, is_clean, resume, salvaged, sample

from madgen.dataset.shards import writer
from madgen.dataset.shards.journal import Piece, read_records
from madgen.dataset.shards.writer import OpenShard


@pytest.mark.parametrize("count", range(5))
def test_committed_samples_are_kept(directory, whole, count):
    shard = begin(directory, count)
    shard.commit()
    shard._tar.write(b"half a sample")  # killed here
    shard._tar.flush()
    assert sorted(salvaged(directory).kept) == list(range(count))
    assert resume(directory) == 4 - count
    assert directory.tar("job-000000").read_bytes() == whole
    assert is_clean(directory)


def test_stop_keeps_complete_samples(directory, whole):
    shard = begin(directory, 2)
    shard.commit()
    shard.leave()
    assert resume(directory) == 2
    assert directory.tar("job-000000").read_bytes() == whole


def test_repeated_stops_lose_no_sample(directory, whole):
    for count in range(1, 4):
        shard = OpenShard(directory, SHARD, "w", salvaged(directory))
        shard.add(count - 1, sample(SHARD.tasks[count - 1]))
        shard.commit()
        shard.leave()
        assert len(list(directory.open_shards.glob("*.tar"))) == 1
    assert resume(directory) == 1
    assert directory.tar("job-000000").read_bytes() == whole


@pytest.mark.parametrize("cut", [1, 700, 3000])
def test_lost_bytes_are_regenerated(directory, whole, cut):
    shard = begin(directory, 4)
    shard.commit()
    shard.leave()
    os.truncate(shard.path, shard.path.stat().st_size - cut)
    kept = sorted(salvaged(directory).kept)
    assert kept == list(range(len(kept)))
    assert 0 < len(kept) < 4
    assert resume(directory) == 4 - len(kept)
    assert directory.tar("job-000000").read_bytes() == whole


def test_damaged_sample_costs_only_itself(directory, whole):
    shard = begin(directory, 4)
    shard.commit()
    shard.leave()
    data = bytearray(shard.path.read_bytes())
    data[shard.settled[1].offset + 600] ^= 1
    shard.path.write_bytes(data)
    assert sorted(salvaged(directory).kept) == [0, 2, 3]
    assert resume(directory) == 1
    assert directory.tar("job-000000").read_bytes() == whole


@pytest.mark.parametrize(
    "tail", [b'{"key": "p3-0000", "off', b"\xff\x00", b"[]\n", b'{"key": 1}\n', b'{"offset": 1}\n']
)
def test_truncated_journal_is_read_up_to_its_last_line(directory, tail):
    shard = begin(directory, 2)
    shard.commit()
    shard.leave()
    with open(shard.journal, "ab") as stream:
        stream.write(tail)
    assert sorted(salvaged(directory).kept) == [0, 1]


def test_two_open_shards_are_merged(directory, whole):
    first = begin(directory, 1)
    first.commit()
    second = begin(directory, 3)
    second.commit()
    os.truncate(first.path, 0)
    assert resume(directory) == 1
    assert is_clean(directory)


def test_open_files_of_another_shard_are_untouched(directory):
    other = OpenShard(directory, PLAN.shard(1), "w")
    other.commit()
    assert salvaged(directory).sources == []
    assert resume(directory) == 4
    assert other.path.exists()


def test_tar_without_sidecar_and_journal_is_generated_again(directory, whole):
    directory.tar("job-000000").write_bytes(whole)
    assert resume(directory) == 4
    assert directory.tar("job-000000").read_bytes() == whole


@pytest.mark.parametrize("change", ["gone", "other"])
def test_recovered_samples_that_change_before_copying_are_an_error(directory, change):
    shard = begin(directory, 3)
    shard.commit()
    shard.leave()
    before = salvaged(directory)
    if change == "gone":
        shard.path.unlink()
    else:
        shard.path.write_bytes(bytes(shard.path.stat().st_size))
    with pytest.raises(OSError, match="salvaged samples have changed"):
        OpenShard(directory, SHARD, "w", before)
    assert {path.stem for path in directory.open_shards.iterdir()} == {shard.path.stem}


def test_full_disk_is_not_filled_further(directory, monkeypatch):
    """If recovered samples cannot be copied, their originals stay, and the copy is removed."""
    shard = begin(directory, 3)
    shard.commit()
    shard.leave()

    def full(*_):
        raise OSError(28, "No space left on device")

    before, kept = sorted(directory.open_shards.iterdir()), salvaged(directory)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(writer, "read_records", full)
        OpenShard(directory, SHARD, "w", kept)
    assert sorted(directory.open_shards.iterdir()) == before
    assert resume(directory) == 1


def test_spans_end_at_the_end_of_the_file(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    with open(tmp_path / "f", "rb") as stream:
        assert read_records(stream, Piece("k", 1, 2, hashlib.sha256(b"bc").hexdigest())) == b"bc"
        assert read_records(stream, Piece("k", 1, 4, hashlib.sha256(b"bc").hexdigest())) is None


def test_journal_is_cut_at_invalid_scores(directory):
    shard = begin(directory, 2)
    shard.commit()
    shard.leave()
    first, second = shard.journal.read_bytes().splitlines()
    shard.journal.write_bytes(first + b"\n" + json.dumps({**json.loads(second), "scores": [1]}).encode() + b"\n")
    assert sorted(salvaged(directory).kept) == [0]
